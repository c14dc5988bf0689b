"""Tokenising: what the model sees of an item."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from fastapi import APIRouter, Response

from service.contract.errors import Invalid, NotFound, TooLarge, UnsupportedMedia
from service.contract.items import EmbeddingItem
from service.contract.operations import TokenizeRequest, TokenizeResponse
from service.deps import Inferrer, Running
from service.edge.bodies import StrictRoute
from service.edge.problems import documented
from service.inference.inputs import Timings, listed, places, tokenise

router = APIRouter(tags=["inference"], prefix="/v1", route_class=StrictRoute)


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
    timings = Timings()
    found = await tokenise(service, model, items, at, timings, hint=body.modality, truncate=body.truncate)
    document = {
        "object": "list",
        "data": [
            {
                "index": index,
                "modality": tokens.modality,
                "tokens": [_plain(sequence) for sequence in tokens.sequences],
                "num_tokens": tokens.num_tokens,
            }
            for index, tokens in enumerate(found)
        ],
        "model": body.model,
    }
    response = Response(json.dumps(document, separators=(",", ":")), media_type="application/json")
    timings.write(response)
    return response


def _plain(sequence: np.ndarray) -> list[Any]:
    return sequence.tolist()
