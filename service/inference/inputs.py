"""The path that every online operation shares: items -> tokens -> vectors.

Tokens are made here, in threads of their own; vectors come from the inference process through the gateway. Vectors made
earlier pass through, and sums are taken here. Every error names the item that it is about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import anyio.to_thread
import numpy as np
from fastapi import Response
from jaxtyping import Float32

from service.catalogue import Model
from service.contract.errors import Invalid, IsthmusError
from service.contract.items import AnyItem, SumItem, as_list
from service.contract.tokens.decode import Limits
from service.contract.tokens.read import read_item
from service.contract.tokens.tokenise import Raw
from service.deps import Service
from service.inference import sums

CHUNK: Final = 16
"""Items in one turn of a tokenising thread: large enough to be cheap, small enough for several threads to share."""

Hint = str | list[str] | None


@dataclass(frozen=True)
class Tokenised:
    """An item as the model sees it: sequences of tokens, a vector made earlier, or weighted parts of such."""

    modality: str
    sequences: list[np.ndarray]
    vector: Float32[np.ndarray, " dim"] | None = None
    parts: list[tuple[float, Tokenised]] = field(default_factory=list["tuple[float, Tokenised]"])

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, and of all parts."""
        return sum(map(len, self.sequences)) + sum(part.num_tokens for _, part in self.parts)


@dataclass
class Timings:
    """Where the time of a request went, milliseconds."""

    tokenise_ms: float = 0.0
    queue_ms: float = 0.0
    inference_ms: float = 0.0

    def write(self, response: Response) -> None:
        """Put the figures into an answer's headers."""
        response.headers["x-tokenise-time"] = f"{self.tokenise_ms:.2f}"
        response.headers["x-queue-time"] = f"{self.queue_ms:.2f}"
        response.headers["x-inference-time"] = f"{self.inference_ms:.2f}"

    def add(self, queue_ms: float, inference_ms: float) -> None:
        """Count another call to the inference process."""
        self.queue_ms += queue_ms
        self.inference_ms += inference_ms


@dataclass(frozen=True)
class Encoded:
    """Vectors of items as the model compares them (unit length for the cosine), in the order of the items."""

    vectors: Float32[np.ndarray, "item dim"]
    modalities: list[str]
    num_tokens: int


def listed(service: Service, items: AnyItem | list[AnyItem], param: str) -> list[AnyItem]:
    """Return a request's items as a list.

    Raises Invalid for more than one request may carry.
    """
    found = as_list(items)
    if len(found) > service.settings.max_items:
        raise Invalid(f"{len(found)} items, at most {service.settings.max_items} in a request", param=param)
    return found


def places(param: str, items: Sequence[AnyItem], given: object) -> list[str]:
    """Name the places of items in a request; `given` is the field as it came, one item or a list."""
    return [f"{param}[{index}]" for index in range(len(items))] if given is items else [param]


async def tokenise(
    service: Service,
    model: Model,
    items: Sequence[AnyItem],
    at: Sequence[str],
    timings: Timings,
    *,
    hint: Hint = None,
    sum_hint: str | None = None,
    truncate: bool = False,
) -> list[Tokenised]:
    """Turn items into tokens; `at` names their places in the request.

    `hint` says what strings are and what sums count as; without it, `sum_hint` says the latter.

    Raises Invalid, UnsupportedMedia or TooLarge for the first item that cannot be read.
    """
    began = time.perf_counter()
    hints = [
        each or (sum_hint if isinstance(item, SumItem) else None)
        for each, item in zip(_hints(model, hint, len(items)), items, strict=True)
    ]
    num_parts = sum(len(item.sum) if isinstance(item, SumItem) else 1 for item in items)
    if num_parts > service.settings.max_items:
        raise Invalid(f"{num_parts} parts of sums and items, at most {service.settings.max_items} in a request")

    def work(start: int) -> list[Tokenised]:
        return [
            _tokenise_one(
                model, items[index], at[index], index, hint=hints[index], limits=service.limits, truncate=truncate
            )
            for index in range(start, min(start + CHUNK, len(items)))
        ]

    chunks = await asyncio.gather(
        *(
            anyio.to_thread.run_sync(work, start, limiter=service.token_threads)
            for start in range(0, len(items), CHUNK)
        ),
        return_exceptions=True,  # so that the first bad item is the one that is named, whichever thread was faster
    )
    found: list[Tokenised] = []
    for chunk in chunks:
        if isinstance(chunk, BaseException):
            raise chunk
        found += chunk
    total = sum(tokens.num_tokens for tokens in found)
    if total > service.settings.max_tokens:
        raise Invalid(f"{total} tokens, at most {service.settings.max_tokens} in a request")
    timings.tokenise_ms += (time.perf_counter() - began) * 1000
    return found


async def encode(
    service: Service,
    model: Model,
    items: Sequence[AnyItem],
    at: Sequence[str],
    timings: Timings,
    *,
    hint: Hint = None,
    truncate: bool = False,
) -> Encoded:
    """Turn items into vectors.

    Raises what `tokenise` and `embed` raise.
    """
    tokenised = await tokenise(service, model, items, at, timings, hint=hint, truncate=truncate)
    return await embed(service, model, tokenised, at, timings)


async def embed(
    service: Service, model: Model, tokenised: Sequence[Tokenised], at: Sequence[str], timings: Timings
) -> Encoded:
    """Turn items that `tokenise` has read into vectors; `at` names their places in the request.

    Raises what the gateway raises.
    """
    leaves: list[Tokenised] = []
    leaves_at: list[str] = []
    for tokens, place in zip(tokenised, at, strict=True):
        leaves += [part for _, part in tokens.parts] or [tokens]
        leaves_at += [f"{place}.sum[{number}].item" for number in range(len(tokens.parts))] or [place]
    z = await _embed_leaves(service, model, leaves, leaves_at, timings)
    vectors = z if len(leaves) == len(tokenised) else np.empty((len(tokenised), model.dimensions), np.float32)
    begin = 0
    for index, tokens in enumerate(tokenised):
        end = begin + max(1, len(tokens.parts))
        if tokens.parts:
            weights = np.array([weight for weight, _ in tokens.parts])
            vectors[index] = sums.add(model.critic, weights, z[begin:end], param=f"{at[index]}.sum", item=index)
        else:
            vectors[index] = z[begin]
        begin = end
    return Encoded(vectors, [tokens.modality for tokens in tokenised], sum(tokens.num_tokens for tokens in tokenised))


async def _embed_leaves(
    service: Service, model: Model, leaves: Sequence[Tokenised], at: Sequence[str], timings: Timings
) -> Float32[np.ndarray, "item dim"]:
    vectors = np.empty((len(leaves), model.dimensions), np.float32)
    by_modality: dict[str, list[int]] = {}
    for index, tokens in enumerate(leaves):
        if tokens.vector is not None:
            vectors[index] = tokens.vector
        else:
            by_modality.setdefault(tokens.modality, []).append(index)

    async def embed_all(modality: str, indices: list[int]) -> None:
        sequences = [leaves[index].sequences for index in indices]
        try:
            vectors[indices], spent = await service.gateway.embed(model.ref, modality, sequences)
        except IsthmusError as error:
            if error.item is not None and error.item < len(indices):
                error.param = at[indices[error.item]]
            raise
        timings.add(spent.queue_ms, spent.inference_ms)

    await asyncio.gather(*(embed_all(modality, indices) for modality, indices in by_modality.items()))
    return vectors


def _hints(model: Model, hint: Hint, num_items: int) -> list[str | None]:
    given = hint if isinstance(hint, list) else [hint]
    for modality in set(given):
        if modality is not None:
            model.check_modality(modality, param="modality")
    if not isinstance(hint, list):
        return [hint] * num_items
    if len(hint) != num_items:
        raise Invalid(f"{len(hint)} modalities for {num_items} items: give one, or one for each", param="modality")
    return list(hint)


def _tokenise_one(
    model: Model, item: AnyItem, at: str, index: int, *, hint: str | None, limits: Limits, truncate: bool
) -> Tokenised:
    if isinstance(item, SumItem):
        parts = [
            (
                part.weight,
                _tokenise_one(
                    model, part.item, f"{at}.sum[{number}].item", index, hint=None, limits=limits, truncate=truncate
                ),
            )
            for number, part in enumerate(item.sum)
        ]
        try:
            return Tokenised(sums.modality_of(model, item, [part.modality for _, part in parts], hint), [], None, parts)
        except IsthmusError as error:
            raise error.at(at, index) from None
    try:
        modality, raw = read_item(item, modality_hint=hint, modalities=model.modalities, limits=limits)
        if isinstance(raw, Raw):
            return Tokenised(modality, model.tokenisers[modality](raw, truncate=truncate))
        return Tokenised(modality, [], _prepared(raw, model))
    except IsthmusError as error:
        raise error.at(at, index) from None


def _prepared(values: np.ndarray, model: Model) -> Float32[np.ndarray, " dim"]:
    if len(values) != model.dimensions:
        raise Invalid(f"a vector of {len(values)} values; the model's have {model.dimensions}", param="embedding")
    wide = values.astype(np.float64)
    if model.critic != "cosine":
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float32)
        if not np.isfinite(narrow).all():
            raise Invalid("a vector holds finite values, of float32's range", param="embedding")
        return narrow
    length = float(np.sqrt(np.sum(wide * wide)))
    if not (np.isfinite(length) and length > 0):
        raise Invalid("a vector needs a direction: finite values, not all of them zero", param="embedding")
    return (wide / length).astype(np.float32)
