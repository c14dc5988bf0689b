"""Embeddings: OpenAI's shape, every kind of item."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Response
from jaxtyping import Float32

from service.contract.errors import Invalid, NotFound, TooLarge, UnsupportedMedia
from service.contract.items import EmbeddingItem
from service.contract.losses import Critic
from service.contract.operations import EmbeddingsRequest, EmbeddingsResponse
from service.deps import Inferrer, Running
from service.edge.problems import documented
from service.inference import critics
from service.inference.answers import respond
from service.inference.hangups import InferenceRoute
from service.inference.inputs import Timings, encode, listed, places

router = APIRouter(tags=["inference"], prefix="/v1", route_class=InferenceRoute)


@router.post(
    "/embeddings",
    operation_id="create_embeddings",
    summary="Embed items",
    response_model=EmbeddingsResponse,
    responses=documented(NotFound, TooLarge, UnsupportedMedia),
)
async def create(service: Running, caller: Inferrer, body: EmbeddingsRequest) -> Response:
    """Embed text, images, sounds, tokens and tensors, in any mix, to vectors of one space.

    They have unit length if the model's critic is the cosine, as it is by default. Models with the critic dot or
    squared_distance give vectors of any length, and the length matters: compare them as `critic` says.
    `usage` counts what the model read: text ids, image patches, sound patches.
    """
    model = await service.catalogue.find(caller.tenant, body.model)
    items = listed(service, body.input, "input")
    at = places("input", items, body.input)
    for place, item in zip(at, items, strict=True):
        if isinstance(item, EmbeddingItem):
            raise Invalid("this is a vector already", param=f"{place}.embedding")
    if body.dimensions is not None and body.dimensions > model.dimensions:
        raise Invalid(f"at most {model.dimensions}, the model's own", param="dimensions")
    timings = Timings()
    found = await encode(service, model, items, at, timings, hint=body.modality, truncate=body.truncate)
    vectors = _cut(model.critic, found.vectors, body.dimensions)

    def entries() -> Iterator[dict[str, Any]]:
        for index, (vector, modality) in enumerate(zip(vectors, found.modalities, strict=True)):
            row = vector.tolist() if body.encoding_format == "float" else _base64(vector)
            yield {"object": "embedding", "index": index, "embedding": row, "modality": modality}

    usage = {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens}
    return await respond(service, entries, {"model": body.model, "usage": usage}, timings, num_values=vectors.size)


def _cut(
    critic: Critic, vectors: Float32[np.ndarray, "item dim"], dimensions: int | None
) -> Float32[np.ndarray, "item dim"]:
    """Keep the first dimensions, normalised again for the cosine; a vector without length in them stays zero."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return critics.prepare(critic, vectors[:, :dimensions])


def _base64(vector: Float32[np.ndarray, " dim"]) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
