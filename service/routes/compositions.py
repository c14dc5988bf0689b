"""What a model can only compose: each pair of modalities that it was not trained on, and how to go about it."""

from __future__ import annotations

from itertools import permutations
from typing import Annotated, Final

from fastapi import APIRouter, Query

from service.catalogue import Model
from service.contract.diagnostics import ModelComposition, ModelCompositionList, PairDiagnostics
from service.contract.errors import Invalid, NotFound
from service.deps import Reader, Running, Service
from service.edge.paging import check_id
from service.edge.problems import documented
from service.inference.hangups import InferenceRoute

router = APIRouter(tags=["models"], prefix="/v1/models", route_class=InferenceRoute)

MAX_EXAMINED: Final = 64
"""Pairs of one request that are not known yet: each takes a tenth of a second or so."""

Wanted = Annotated[str | None, Query(max_length=64)]


@router.get(
    "/{name}/composition",
    operation_id="examine_composition",
    summary="Say how to compose modalities that were never paired",
    responses=documented(NotFound),
)
async def examine(
    service: Running,
    caller: Reader,
    name: str,
    from_: Annotated[Wanted, Query(alias="from", description="a modality; left out: all")] = None,
    to: Annotated[Wanted, Query(description="a modality; left out: all")] = None,
) -> ModelCompositionList:
    """Tell, for each ordered pair that was never trained and each bridge, which method to use and why.

    The figures come from the banks that the model keeps. Whether source and target are independent given the bridge
    shows in samples that hold all three only: the part `composition` of an evaluation looks for them.
    """
    model = await service.catalogue.find(caller.tenant, check_id(name))
    for given, param in ((from_, "from"), (to, "to")):
        if given is not None and given not in model.modalities:
            known = ", ".join(sorted(model.modalities))
            raise NotFound(f"the model has no such modality; it has {known}", param=param, code="modality_not_found")
    if from_ is not None and to is not None:
        _check(model, from_, to)
    pairs = [
        (source, target)
        for source, target in permutations(sorted(model.modalities), 2)
        if from_ in {None, source} and to in {None, target} and not model.is_trained(source, target)
    ]
    unknown = [
        pair for pair in pairs if _bridges_with_banks(model, *pair) and not service.examinations.knows(model.ref, *pair)
    ]
    if len(unknown) > MAX_EXAMINED:
        message = f"{len(unknown)} pairs are more than one request looks at ({MAX_EXAMINED}): name `from` or `to`"
        raise Invalid(message, code="too_many_pairs")
    return ModelCompositionList(data=[each for pair in pairs for each in await _of_pair(service, model, *pair)])


def _check(model: Model, from_: str, to: str) -> None:
    if from_ == to:
        raise Invalid("source and target are one modality, whose vectors can be compared", param="to")
    if model.is_trained(from_, to):
        message = f"{from_} and {to} were trained together: nothing needs to be composed"
        raise Invalid(message, param="to", code="pair_trained")
    if not _bridges(model, from_, to):
        message = f"no modality was trained with both {from_} and {to}; trained: {model.described_pairs()}"
        raise Invalid(message, param="to", code="no_bridge")
    is_compared = any(_regressed(model, each, from_, to) for each in _bridges(model, from_, to))
    if not is_compared and not _bridges_with_banks(model, from_, to):
        raise Invalid(_no_bank(_bridges(model, from_, to)[0], from_, to), code="no_bank")


def _bridges(model: Model, source: str, target: str) -> list[str]:
    return sorted(set(model.partners(source)) & set(model.partners(target)))


def _bridges_with_banks(model: Model, source: str, target: str) -> list[str]:
    return [each for each in _bridges(model, source, target) if _has_banks(model, each, source, target)]


def _has_banks(model: Model, through: str, source: str, target: str) -> bool:
    return all(model.has_bank(end, through) for end in (source, target)) and not _regressed(
        model, through, source, target
    )


def _regressed(model: Model, through: str, source: str, target: str) -> list[str]:
    """Return the ends that were trained with the bridge by regression: nothing can be summed over it."""
    return [end for end in (source, target) if not model.gives_ratios(end, through)]


async def _of_pair(service: Service, model: Model, source: str, target: str) -> list[ModelComposition]:
    bridges = _bridges(model, source, target)
    found: dict[str, PairDiagnostics] = {}
    if _bridges_with_banks(model, source, target):
        found = await service.examinations.of(service.gateway, model.ref, source, target)

    def entry(through: str | None) -> ModelComposition:
        known = None if through is None else found.get(through)
        method = None if known is None else known.method
        if through is None:
            reason = "no modality was trained with both"
        elif ends := _regressed(model, through, source, target):
            method = "direct"
            reason = f"{' and '.join(ends)} learned {through} by regression, which gives no ratios to sum"
        else:
            reason = _no_bank(through, source, target) if known is None else known.reason
        fields = {
            "from": source,
            "to": target,
            "through": through,
            "critic": model.critic,
            "method": method,
            "reason": reason,
            "diagnostics": known,
        }
        return ModelComposition.model_validate(fields)

    return [entry(through) for through in bridges] or [entry(None)]


def _no_bank(through: str, source: str, target: str) -> str:
    legs = f"{source} with {through} and {through} with {target}"
    return f"the model does not keep the banks of {legs}: compose gives the answer if it is given items of {through}"
