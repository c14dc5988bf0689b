"""Which way a composition goes: the legs from the source's modality to the target's, and the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from service.catalogue import Catalogue, Model
from service.contract.errors import Invalid
from service.contract.jobs import ComposeArgs
from service.contract.operations import ComposeRequest
from service.contract.wire import ComposeLeg

Method = Literal["direct", "marginal"]
Wanted = Literal["auto", "direct", "marginal"]


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

    @property
    def through(self) -> str | None:
        """Name the modality in the middle."""
        return self.legs[0].to if len(self.legs) == 2 else None


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
    through = body.through if isinstance(body.through, str) else None
    if body.legs is not None:
        if through is not None and (len(body.legs) < 2 or through != body.legs[0].to):
            raise Invalid("the legs do not go through this modality", param="through")
        legs = [Leg(model, leg.from_, leg.to) for model, leg in zip(models, body.legs, strict=True)]
        return along(legs, from_, to, wanted=body.method)
    if through is not None:
        models[0].check_modality(through, param="through")
    given = body.through is not None and through is None
    return within(models[0], from_, to, through=through, given_bridge=given, wanted=body.method)


def check_banks(way: Way) -> None:
    """Raise Invalid for a leg whose model keeps no bridge."""
    for leg in way.legs:
        if not leg.model.has_bank(leg.from_, leg.to):
            raise Invalid(
                f"the model keeps no bridge bank of {leg.from_} and {leg.to}: give the bridge items with `through`",
                param="through",
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
    untrained = f"{source} and {target} were never trained together; both were trained with {bridge}"
    reason = "asked for" if wanted == "marginal" else "asked to go through a bridge" if trained else untrained
    return Way(_two(model, source, bridge, target), "marginal", reason)


def along(legs: list[Leg], source: str, target: str, *, wanted: Wanted) -> Way:
    """Check the legs that a request names.

    Raises Invalid for legs that do not meet, do not fit the items, or were never trained.
    """
    if len(legs) > 2:
        raise Invalid("more than two legs cannot be composed yet", param="legs", code="too_many_legs")
    for index, leg in enumerate(legs):
        leg.model.scale(leg.from_, leg.to, param=f"legs[{index}]")
    if legs[0].from_ != source:
        raise Invalid(f"the source is {source}, the first leg starts at {legs[0].from_}", param="legs[0].from")
    if legs[-1].to != target:
        raise Invalid(f"the target is {target}, the last leg ends at {legs[-1].to}", param=f"legs[{len(legs) - 1}].to")
    if len(legs) == 1:
        if wanted == "marginal":
            raise Invalid("marginal sums over what joins two legs, and there is one", param="method")
        return Way(legs, "direct", f"{source} and {target} were trained together")
    if legs[0].to != legs[1].from_:
        raise Invalid(f"the legs do not meet: {legs[0].to} and {legs[1].from_}", param="legs[1].from")
    if wanted == "direct":
        return Way(legs, "direct", "asked for; a score across a bridge is no ratio")
    return Way(legs, "marginal", "asked for" if wanted == "marginal" else f"two legs that meet in {legs[0].to}")


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
