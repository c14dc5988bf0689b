"""Composition: source items against targets of a modality they were never paired with, through what joins both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from jaxtyping import Float32

from service import embedding_sets
from service.catalogue import Model
from service.contract.errors import Invalid, IsthmusError, NotFound, TooLarge, UnsupportedMedia
from service.contract.items import AnyItem
from service.contract.operations import ComposeRequest, ComposeResponse, EmbeddingSetRef
from service.contract.tokens.read import read_item
from service.contract.wire import Arrays, ComposeAnswer, ComposeCall
from service.deps import Inferrer, Running, Service
from service.edge.problems import documented
from service.inference.answers import check_matches, respond
from service.inference.hangups import InferenceRoute
from service.inference.inputs import Timings, encode, listed, places
from service.inference.legs import Leg, Way, along, within
from service.keys import Caller

router = APIRouter(tags=["inference"], prefix="/v1", route_class=InferenceRoute)


@dataclass(frozen=True)
class Side:
    """Vectors of one modality, and the tokens that were read for them."""

    vectors: Float32[np.ndarray, "item dim"]
    num_tokens: int


@dataclass(frozen=True)
class Asked:
    """A request, who sent it, and where its time goes."""

    service: Service
    caller: Caller
    body: ComposeRequest
    timings: Timings


@router.post(
    "/compose",
    operation_id="compose",
    summary="Compare modalities that were never paired",
    response_model=ComposeResponse,
    responses=documented(NotFound, TooLarge, UnsupportedMedia),
)
async def create(service: Running, caller: Inferrer, body: ComposeRequest) -> Response:
    """Answer, for each source item, which targets go with it, how likely, and how far to trust that.

    With one `model` the bridge is a modality that it was trained on with both; with `legs` every step is named.
    """
    models = await _models(service, caller, body)
    source = listed(service, body.source, "source")
    target = body.target if isinstance(body.target, EmbeddingSetRef) else listed(service, body.target, "target")
    from_ = _modality(service, models[0], source, "source", body.source, hint=body.source_modality)
    to = await _target_modality(service, caller, models[-1], target, body)
    way = _way(body, models, from_, to)
    timings = Timings()
    asked = Asked(service, caller, body, timings)
    left = await _side(asked, way.legs[0].model, source, from_, "source")
    right = await _side(asked, way.legs[-1].model, target, to, "target")
    top_k = min(body.top_k, len(right.vectors))
    check_matches(len(left.vectors), top_k)
    arrays: Arrays = {"source": left.vectors, "target": right.vectors}
    log_prior = _log_prior(body, len(right.vectors))
    if body.prior is not None:
        arrays["log_prior"] = log_prior
    num_bridge_tokens = await _add_bridge(asked, way, arrays)
    call = ComposeCall(
        legs=[leg.on_wire() for leg in way.legs],
        method=way.method,
        bank="bridge.0" not in arrays,
        log_prior=body.prior is not None,
        top_k=top_k,
    )
    document, found, spent = await service.gateway.compose(call, arrays)
    timings.add(spent.queue_ms, spent.inference_ms)
    num_tokens = left.num_tokens + right.num_tokens + num_bridge_tokens
    names = [body.model] if body.model is not None else [leg.model for leg in body.legs or []]
    rest = {
        "models": list(dict.fromkeys(names)),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    answer = ComposeAnswer.model_validate(document)
    return await respond(
        service, lambda: _rows(answer, found, way, log_prior), rest, timings, num_values=5 * found["index"].size
    )


async def _models(service: Service, caller: Caller, body: ComposeRequest) -> list[Model]:
    """Return the model of the first leg and of the last."""
    if (body.model is None) == (body.legs is None):
        raise Invalid("give either model or legs", param="model")
    if body.model is not None:
        return [await service.catalogue.find(caller.tenant, body.model)]
    return [
        await service.catalogue.find(caller.tenant, leg.model, param=f"legs[{index}].model")
        for index, leg in enumerate(body.legs or [])
    ]


def _way(body: ComposeRequest, models: list[Model], from_: str, to: str) -> Way:
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


def _modality(
    service: Service, model: Model, items: list[AnyItem], name: str, given: object, *, hint: str | None
) -> str:
    """Return the modality of the first item: all the others have to be of the same."""
    if hint is not None:
        model.check_modality(hint, param=f"{name}_modality")
    try:
        modality, _ = read_item(items[0], modality_hint=hint, modalities=model.modalities, limits=service.limits)
    except IsthmusError as error:
        raise error.at(places(name, items, given)[0]) from None
    return modality


async def _target_modality(
    service: Service, caller: Caller, model: Model, target: list[AnyItem] | EmbeddingSetRef, body: ComposeRequest
) -> str:
    if not isinstance(target, EmbeddingSetRef):
        return _modality(service, model, target, "target", body.target, hint=body.target_modality)
    found = await embedding_sets.find(service, caller.tenant, target.embeddings, param="target.embeddings")
    return found.about.modality


async def _side(asked: Asked, model: Model, given: list[AnyItem] | EmbeddingSetRef, modality: str, name: str) -> Side:
    """Return the vectors of `source`, `target` or `through`, embedded unless they come from an embedding set."""
    if isinstance(given, EmbeddingSetRef):
        return Side(await _read_set(asked, model, given, modality, name), 0)
    body = asked.body
    hint = {"source": body.source_modality, "target": body.target_modality}.get(name, modality)
    original = {"source": body.source, "target": body.target}.get(name, given)
    at = places(name, given, original)
    found = await encode(asked.service, model, given, at, asked.timings, hint=hint, truncate=body.truncate)
    for place, each in zip(at, found.modalities, strict=True):
        if each != modality:
            raise Invalid(f"this is {each}, not {modality}: all are of one modality", param=place)
    return Side(found.vectors, found.num_tokens)


async def _read_set(
    asked: Asked, model: Model, ref: EmbeddingSetRef, modality: str, name: str
) -> Float32[np.ndarray, "item dim"]:
    param = f"{name}.embeddings"
    operand = await embedding_sets.find(asked.service, asked.caller.tenant, ref.embeddings, param=param)
    if operand.about.model_digest != model.ref.digest:
        raise Invalid("these vectors were made by another model", param=param, code="model_differs")
    if operand.about.modality != modality:
        raise Invalid(f"these vectors are of {operand.about.modality}, not {modality}", param=param)
    return await embedding_sets.vectors(asked.service, operand, param=param)


async def _add_bridge(asked: Asked, way: Way, arrays: Arrays) -> int:
    """Put the bridge that the request gives among the tensors, embedded by the model of each leg; count its tokens."""
    given = asked.body.through
    if way.method != "marginal":
        return 0
    if given is None or isinstance(given, str):
        _check_banks(way)
        return 0
    first, second = way.legs
    items = given if isinstance(given, EmbeddingSetRef) else listed(asked.service, given, "through")
    left = await _side(asked, first.model, items, first.to, "through")
    same = first.model.ref.digest == second.model.ref.digest
    right = left if same else await _side(asked, second.model, items, second.from_, "through")
    arrays["bridge.0"], arrays["bridge.1"] = left.vectors, right.vectors
    return left.num_tokens if same else left.num_tokens + right.num_tokens


def _check_banks(way: Way) -> None:
    for leg in way.legs:
        if not leg.model.has_bank(leg.from_, leg.to):
            raise Invalid(
                f"the model keeps no bridge bank of {leg.from_} and {leg.to}: give the bridge items with `through`",
                param="through",
                code="no_bank",
            )


def _log_prior(body: ComposeRequest, num_targets: int) -> Float32[np.ndarray, " target"]:
    if body.prior is None:
        return np.full(num_targets, -math.log(num_targets), np.float32)
    if len(body.prior) != num_targets:
        raise Invalid(f"{len(body.prior)} priors for {num_targets} targets", param="prior")
    weights = np.array(body.prior, np.float64)
    largest = weights.max()
    if largest <= 0:
        raise Invalid("not every prior can be zero", param="prior")
    weights /= largest  # first, so that the sum of large ones stays finite
    with np.errstate(divide="ignore"):
        return np.log(weights / weights.sum()).astype(np.float32)


def _rows(
    answer: ComposeAnswer, found: Arrays, way: Way, log_prior: Float32[np.ndarray, " target"]
) -> Iterator[dict[str, Any]]:
    index, ratio = found["index"], found["log_ratio"].astype(np.float64)
    # p(target | source, one of the targets) = prior * ratio / sum over all targets of prior * ratio
    posterior = np.exp(log_prior[index] + ratio - found["log_normaliser"].astype(np.float64)[:, None])
    sizes, agreements = answer.effective_sample_size, answer.direct_marginal_spearman
    for row in range(len(index)):
        yield {
            "object": "composition",
            "index": row,
            "matches": [
                {
                    "index": int(index[row, rank]),
                    "score": float(found["score"][row, rank]),
                    "log_ratio": _number(ratio[row, rank]),
                    "standard_error": _number(found["standard_error"][row, rank]),
                    "posterior": _number(min(posterior[row, rank], 1.0)),
                }
                for rank in range(index.shape[1])
            ],
            "diagnostics": {
                "method": way.method,
                "reason": way.reason,
                "through": way.through,
                "bridge_size": answer.bridge_size,
                "effective_sample_size": None if sizes is None else sizes[row],
                "bridge_resultant": answer.bridge_resultant,
                "direct_marginal_spearman": None if agreements is None else agreements[row],
                "normalised": answer.normalised,
                "value_trusted": answer.value_trusted,
                "warnings": answer.warnings,
            },
        }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
