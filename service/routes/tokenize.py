"""Tokenising: what the model sees of an item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Response

from service.contract.errors import Invalid, NotFound, TooLarge, UnsupportedMedia
from service.contract.items import EmbeddingItem, SumItem
from service.contract.operations import TokenizeRequest, TokenizeResponse
from service.deps import Inferrer, Running
from service.edge.problems import documented
from service.inference.answers import respond
from service.inference.hangups import InferenceRoute
from service.inference.inputs import Timings, listed, places, tokenise

router = APIRouter(tags=["inference"], prefix="/v1", route_class=InferenceRoute)


@router.post(
    "/tokenize",
    operation_id="tokenize",
    summary="Turn items into tokens",
    response_model=TokenizeResponse,
    responses=documented(NotFound, TooLarge, UnsupportedMedia),
)
async def create(service: Running, caller: Inferrer, body: TokenizeRequest) -> Response:
    """Turn items into tokens with a model's own tokenisers; no worker takes part."""
    model = await service.catalogue.find(caller.tenant, body.model)
    items = listed(service, body.input, "input")
    at = places("input", items, body.input)
    for place, item in zip(at, items, strict=True):
        if isinstance(item, EmbeddingItem):
            raise Invalid("a vector has no tokens", param=f"{place}.embedding")
        if isinstance(item, SumItem):
            raise Invalid("a sum has no tokens of its own: send its parts", param=f"{place}.sum")
    timings = Timings()
    found = await tokenise(service, model, items, at, timings, hint=body.modality, truncate=body.truncate)

    def entries() -> Iterator[dict[str, Any]]:
        for index, tokens in enumerate(found):
            yield {
                "index": index,
                "modality": tokens.modality,
                "tokens": [sequence.tolist() for sequence in tokens.sequences],
                "num_tokens": tokens.num_tokens,
            }

    num_values = sum(sequence.size for tokens in found for sequence in tokens.sequences)
    return await respond(service, entries, {"model": body.model}, timings, num_values=num_values)
