"""Which way a composition goes: the legs from the source's modality to the target's, and the method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from service.catalogue import Catalogue, Model
from service.contract.errors import Invalid
from service.contract.jobs import ComposeArgs
from service.contract.joints import Asked, joints_of
from service.contract.operations import ComposeRequest
from service.contract.wire import ComposeLeg

Method = Literal["direct", "marginal", "analytic"]
Wanted = Literal["auto", "direct", "marginal", "analytic"]


@dataclass(frozen=True)
class Leg:
    """A trained pair of a model, walked from one modality to the other."""

    model: Model
    from_: str
    to: str

    def on_wire(self) -> ComposeLeg:
        """Return the leg as the inference process takes it."""
        return ComposeLeg.model_validate({"model": self.model.ref, "from": self.from_, "to": self.to})


@dataclass(frozen=True)
class Way:
    """The legs, the method, and why it was chosen; the bridge's modality if there are two legs."""

    legs: list[Leg]
    method: Method
    reason: str
    is_open: bool = False  # the health of the sum may make it a direct comparison
    joints: list[Asked] = field(default_factory=list[Asked])  # what the request says of the bridge between each two

    @property
    def through(self) -> str | None:
        """Name the modality in the middle."""
        return self.legs[0].to if len(self.legs) == 2 else None

    @property
    def path(self) -> list[str]:
        """Name the modalities that it goes through."""
        return [self.legs[0].from_, *(leg.to for leg in self.legs)]


async def models_of(catalogue: Catalogue, tenant: str, body: ComposeRequest | ComposeArgs) -> list[Model]:
    """Return the models that a request names, one for each leg.

    Raises NotFound, Invalid if it names both a model and legs, or neither.
    """
    if (body.model is None) == (body.legs is None):
        raise Invalid("give either model or legs", param="model")
    if body.model is not None:
        return [await catalogue.find(tenant, body.model)]
    return [
        await catalogue.find(tenant, leg.model, param=f"legs[{index}].model")
        for index, leg in enumerate(body.legs or [])
    ]


def way_of(body: ComposeRequest | ComposeArgs, models: list[Model], from_: str, to: str) -> Way:
    """Choose the way that a request asks for, from the source's modality to the target's.

    Raises Invalid where there is none.
    """
    joints = joints_of(body.through, body.bridge_weights, 1 if body.legs is None else len(body.legs) - 1)
    given = joints[0].through if len(joints) == 1 else None
    through = given if isinstance(given, str) else None
    if body.legs is not None:
        if through is not None and through != body.legs[0].to:
            raise Invalid("the legs do not go through this modality", param="through")
        legs = [Leg(model, leg.from_, leg.to) for model, leg in zip(models, body.legs, strict=True)]
        return replace(along(legs, from_, to, wanted=body.method), joints=joints)
    if through is not None:
        models[0].check_modality(through, param="through")
    is_given = given is not None and through is None
    way = within(models[0], from_, to, through=through, given_bridge=is_given, wanted=body.method)
    return replace(way, joints=joints)


def check_bank_bridge(way: Way, at: int) -> None:
    """Raise Invalid for a bridge that is to be of the models' banks, if it is another modality's or there is none."""
    pair, asked = way.legs[at : at + 2], way.joints[at]
    if isinstance(asked.through, str) and asked.through != pair[0].to:
        raise Invalid(f"the legs meet in {pair[0].to} here, not in {asked.through}", param=asked.param)
    # A closed form over the sphere can do without a bridge; what else it needs, the worker says.
    for leg in pair if way.method == "marginal" else ():
        if not leg.model.has_bank(leg.from_, leg.to):
            raise Invalid(
                f"the model keeps no bridge bank of {leg.from_} and {leg.to}: give the bridge items with `through`",
                param=asked.param,
                code="no_bank",
            )


def within(model: Model, source: str, target: str, *, through: str | None, given_bridge: bool, wanted: Wanted) -> Way:
    """Choose the way inside one model.

    Raises Invalid, naming the trained pairs, where there is none.
    """
    trained = model.is_trained(source, target)
    if trained and (wanted == "direct" or (wanted == "auto" and through is None and not given_bridge)):
        reason = f"{source} and {target} were trained together"
        return Way([Leg(model, source, target)], "direct", reason)
    bridge = _bridge(model, source, target, through)
    if wanted == "direct":
        reason = "asked for; this pair was never trained, so its scores are no ratios"
        legs = [Leg(model, source, target)] if bridge is None else _two(model, source, bridge, target)
        return Way(legs, "direct", reason)
    if bridge is None:
        raise Invalid(
            f"no modality was trained with both {source} and {target}"
            f"{f' by way of {through}' if through else ''}; trained: {model.described_pairs()}",
            param="through" if through else "model",
            code="no_bridge",
        )
    legs = _two(model, source, bridge, target)
    untrained = f"{source} and {target} were never trained together; both were trained with {bridge}"
    reason = "asked to go through a bridge" if trained else untrained
    if (no_ratio := regressed(legs)) is not None:
        return _compared(legs, no_ratio, reason, wanted)
    if wanted != "auto":
        return Way(legs, wanted, "asked for")
    return Way(legs, "marginal", reason, is_open=True)


def regressed(legs: Sequence[Leg]) -> str | None:
    """Say why nothing can be summed over the legs, if one of them was trained by regression."""
    for leg in legs:
        if not leg.model.gives_ratios(leg.from_, leg.to):
            return f"{leg.from_} and {leg.to} were trained by regression, which gives no ratios to sum"
    return None


def _compared(legs: list[Leg], no_ratio: str, reason: str, wanted: Wanted) -> Way:
    """Compare where nothing can be summed, unless a sum is asked for, or nothing can be compared either."""
    if wanted != "auto":
        raise Invalid(f"{no_ratio}: use the method direct", param="method", code="no_ratio")
    if len({leg.model.ref.digest for leg in legs}) > 1:
        message = f"{no_ratio}, and vectors of several models cannot be compared"
        raise Invalid(message, param="legs", code="no_ratio")
    return Way(legs, "direct", f"{reason}; {no_ratio}")


def along(legs: list[Leg], source: str, target: str, *, wanted: Wanted) -> Way:
    """Check the legs that a request names.

    Raises Invalid for legs that do not meet, do not fit the items, or were never trained.
    """
    for index, leg in enumerate(legs):
        leg.model.scale(leg.from_, leg.to, param=f"legs[{index}]")
        if index and legs[index - 1].to != leg.from_:
            message = f"the legs do not meet: {legs[index - 1].to} and {leg.from_}"
            raise Invalid(message, param=f"legs[{index}].from")
    if legs[0].from_ != source:
        raise Invalid(f"the source is {source}, the first leg starts at {legs[0].from_}", param="legs[0].from")
    if legs[-1].to != target:
        raise Invalid(f"the target is {target}, the last leg ends at {legs[-1].to}", param=f"legs[{len(legs) - 1}].to")
    if len(legs) == 1:
        if wanted in {"marginal", "analytic"}:
            raise Invalid(f"{wanted} sums over what joins two legs, and there is one", param="method")
        return Way(legs, "direct", f"{source} and {target} were trained together")
    if wanted == "direct":
        return Way(legs, "direct", "asked for; a score across a bridge is no ratio")
    if wanted == "analytic" and len(legs) > 2:
        message = "a closed form sums over one bridge, and here are several: use the method marginal"
        raise Invalid(message, param="method", code="no_closed_form")
    number = "two" if len(legs) == 2 else str(len(legs))
    meet = ", ".join(dict.fromkeys(leg.to for leg in legs[:-1]))
    reason = f"{number} legs that meet in {meet}"
    if (no_ratio := regressed(legs)) is not None:
        return _compared(legs, no_ratio, reason, wanted)
    if wanted != "auto":
        return Way(legs, wanted, "asked for")
    return Way(legs, "marginal", reason, is_open=True)


def _bridge(model: Model, source: str, target: str, through: str | None) -> str | None:
    """Return the modality trained with both, the one that is asked for, or the first by name that keeps a bank."""
    found = [each for each in model.partners(source) if each in model.partners(target)]
    if through is not None:
        return through if through in found else None
    return min(
        found, key=lambda each: (not all(model.has_bank(each, end) for end in (source, target)), each), default=None
    )


def _two(model: Model, source: str, bridge: str, target: str) -> list[Leg]:
    return [Leg(model, source, bridge), Leg(model, bridge, target)]
