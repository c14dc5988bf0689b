"""Composition: source items against targets of a modality they were never paired with, through what joins both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from jaxtyping import Float32

from service.contract.errors import Invalid, IsthmusError, NotFound, TooLarge, UnsupportedMedia
from service.contract.operations import ComposeRequest, ComposeResponse
from service.contract.priors import as_log_prior
from service.contract.vectors import Strings
from service.contract.wire import Arrays, ComposeAnswer, ComposeCall
from service.deps import Inferrer, Running
from service.edge.problems import documented
from service.inference.answers import check_matches, respond
from service.inference.hangups import InferenceRoute
from service.inference.inputs import Timings
from service.inference.legs import Way, models_of, way_of
from service.inference.operands import Reader, Tensors

router = APIRouter(tags=["inference"], prefix="/v1", route_class=InferenceRoute)


@router.post(
    "/compose",
    operation_id="compose",
    summary="Compare modalities that were never paired",
    response_model=ComposeResponse,
    responses=documented(NotFound, TooLarge, UnsupportedMedia),
)
async def create(service: Running, caller: Inferrer, body: ComposeRequest) -> Response:
    """Answer, for each source item, which targets go with it, how likely, and how far to trust that.

    With one `model` the bridge is a modality that it was trained on with both; with `legs` every step is named, and
    there may be more than two, each of another model.
    """
    models = await models_of(service.catalogue, caller.tenant, body)
    timings = Timings()
    reader = Reader(service, caller.tenant, timings, body.truncate)
    begin, end = (body.legs[0].from_, body.legs[-1].to) if body.legs else (None, None)
    source = await reader.read(models[0], body.source, "source", hint=body.source_modality, sum_hint=begin)
    target = await reader.read(models[-1], body.target, "target", hint=body.target_modality, sum_hint=end)
    way = way_of(body, models, source.modality, target.modality)
    top_k = min(body.top_k, len(target))
    check_matches(len(source), top_k)
    log_prior = _log_prior(body, len(target))
    tensors = Tensors()
    is_sent = reader.send(source, "source", tensors)
    if not is_sent:
        await reader.embed(source, "source", tensors)
    await reader.embed(target, "target", tensors)
    if body.prior is not None:
        tensors.arrays["log_prior"] = log_prior
    num_bridge_tokens = await reader.add_bridges(way, tensors)
    call = ComposeCall(
        legs=[leg.on_wire() for leg in way.legs],
        method="auto" if way.is_open else way.method,
        bank=any(f"bridge.{2 * at}" not in tensors for at in range(len(way.legs) - 1)),
        log_prior=body.prior is not None,
        sets=tensors.sets,
        source_items=is_sent,
        top_k=top_k,
    )
    try:
        document, found, spent = await service.gateway.compose(call, tensors.arrays)
    except IsthmusError as error:
        raise source.blamed(error) if is_sent else error from None
    timings.add(spent.queue_ms, spent.inference_ms)
    num_tokens = source.num_tokens + target.num_tokens + num_bridge_tokens
    names = [body.model] if body.model is not None else [leg.model for leg in body.legs or []]
    rest = {
        "models": list(dict.fromkeys(names)),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    answer = ComposeAnswer.model_validate(document)
    return await respond(
        service, lambda: _rows(answer, found, way, log_prior), rest, timings, num_values=6 * found["index"].size
    )


def _log_prior(body: ComposeRequest, num_targets: int) -> Float32[np.ndarray, " target"]:
    if body.prior is None:
        return np.full(num_targets, -math.log(num_targets), np.float32)
    if len(body.prior) != num_targets:
        raise Invalid(f"{len(body.prior)} priors for {num_targets} targets", param="prior")
    return as_log_prior(body.prior).astype(np.float32)


def _rows(
    answer: ComposeAnswer, found: Arrays, way: Way, log_prior: Float32[np.ndarray, " target"]
) -> Iterator[dict[str, Any]]:
    keys = Strings(found["key.bytes"], found["key.ends"]).decoded() if "key.ends" in found else None
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
                    "key": None if keys is None else keys[row * index.shape[1] + rank],
                    "score": float(found["score"][row, rank]),
                    "log_ratio": _number(ratio[row, rank]),
                    "standard_error": _number(found["standard_error"][row, rank]),
                    "posterior": _number(min(posterior[row, rank], 1.0)),
                }
                for rank in range(index.shape[1])
            ],
            "diagnostics": {
                "method": answer.method,
                "reason": way.reason if answer.reason is None else f"{way.reason}; {answer.reason}",
                "through": way.through,
                "path": way.path,
                "bridge_size": answer.bridge_size,
                "effective_sample_size": None if sizes is None else sizes[row],
                "standard_error": _number(np.median(found["standard_error"][row])),
                "bias": _number(np.median(found["bias"][row])),
                "bridge_resultant": answer.bridge_resultant,
                "direct_marginal_spearman": None if agreements is None else agreements[row],
                "normalised": answer.normalised,
                "value_trusted": answer.value_trusted,
                "warnings": answer.warnings,
            },
        }


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
