"""Embed: check the sequences of a call, cut them into items, and run a batch of items through a tower."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast, final

import numpy as np
import torch

from service.contract.errors import Invalid, Malformed, Unavailable
from service.contract.modality import AudioTokens, ContinuousTokens, DiscreteTokens, ImageTokens, TextTokens
from worker.learning.device import failure_of, precision_of
from worker.learning.model import vocab_sizes
from worker.learning.ragged import Ragged
from worker.serving.batcher import Entry

if TYPE_CHECKING:
    from service.contract.wire import Arrays
    from worker.learning.model import Loaded

MAX_SEQUENCES: Final = 1 << 20


@final
@dataclass(frozen=True)
class Item:
    """One item of a call: its sequences end to end."""

    values: np.ndarray  # (token,) or (token, dim)
    lengths: np.ndarray  # (sequence,)


def entries(loaded: Loaded, modality: str, arrays: Arrays) -> list[Entry]:
    """Cut the tensors of an embed call into items.

    Raises Malformed if the tensors do not fit each other, Invalid if they do not fit the model.
    """
    tower = loaded.recipe.towers.get(modality)
    if tower is None:
        known = ", ".join(loaded.recipe.towers)
        raise Invalid(f"the model has no modality {modality!r}; it has {known}", param="modality", code="no_modality")
    if arrays.keys() != {"values", "lengths", "owners"}:
        raise Malformed("an embed call has the tensors values, lengths and owners")
    values, lengths, owners = arrays["values"], arrays["lengths"], arrays["owners"]
    _check_layout(values, lengths, owners)
    longest = int(lengths.max())
    if longest > tower.tokens.max_length:
        at = int(owners[lengths.argmax()])
        limit = tower.tokens.max_length
        raise Invalid(f"a sequence has {longest} tokens; {modality!r} takes at most {limit}", code="too_long", item=at)
    starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    first = np.concatenate(([0], np.flatnonzero(np.diff(owners)) + 1, [len(owners)]))  # of each item's sequences

    def item_of_token(token: int) -> int:
        return int(owners[np.searchsorted(starts, token, side="right") - 1])

    match tower.tokens:
        case TextTokens() | DiscreteTokens():
            _check_ids(values, vocab_sizes(loaded.recipe, loaded.tokenisers)[modality], item_of_token)
        case ImageTokens(dim=dim):
            _check_vectors(values, np.dtype(np.uint8), dim, item_of_token)
        case AudioTokens(dim=dim) | ContinuousTokens(dim=dim):
            _check_vectors(values, np.dtype(np.float32), dim, item_of_token)
    return [
        Entry(
            Item(values[starts[begin] : starts[end]], lengths[begin:end]),
            length=int(lengths[begin:end].max()),
            num_sequences=int(end - begin),
        )
        for begin, end in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)
    ]


def _check_layout(values: np.ndarray, lengths: np.ndarray, owners: np.ndarray) -> None:
    if not (np.issubdtype(lengths.dtype, np.integer) and np.issubdtype(owners.dtype, np.integer)):
        raise Malformed("lengths and owners are integers")
    if lengths.ndim != 1 or owners.shape != lengths.shape or not 1 <= len(lengths) <= MAX_SEQUENCES:
        raise Malformed("lengths and owners have one entry for each sequence, and there is at least one")
    if values.ndim not in {1, 2} or int(lengths.min()) < 1 or int(lengths.sum(dtype=np.int64)) != len(values):
        raise Malformed("lengths are at least 1 and add up to the length of values")
    steps = np.diff(owners.astype(np.int64), prepend=-1)
    if steps[0] != 1 or int(steps.min()) < 0 or int(steps.max()) > 1:
        raise Malformed("owners start at 0 and ascend without gaps")


def _check_ids(values: np.ndarray, vocab: int, item_of_token: Callable[[int], int]) -> None:
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise Malformed("values of this modality are ids")
    if len(bad := np.flatnonzero((values < 0) | (values >= vocab))):
        at = item_of_token(int(bad[0]))
        raise Invalid(f"token id {int(values[bad[0]])} is not in [0, {vocab})", code="bad_token", item=at)


def _check_vectors(values: np.ndarray, dtype: np.dtype[Any], dim: int, item_of_token: Callable[[int], int]) -> None:
    if values.ndim != 2 or values.dtype != dtype:
        raise Malformed(f"values of this modality are vectors of {dtype}")
    if values.shape[1] != dim:
        raise Invalid(f"a token has {values.shape[1]} values; the model takes {dim}", code="bad_token", item=0)
    if dtype.kind == "f" and len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1))):
        at = item_of_token(int(bad[0]))
        raise Invalid("a token holds NaN or infinity", code="bad_token", item=at)


def gather(items: Sequence[Item]) -> Ragged:
    """Lay items end to end."""
    values = torch.from_numpy(np.concatenate([item.values for item in items]))
    counts = [len(item.lengths) for item in items]
    owners = torch.repeat_interleave(torch.arange(len(items)), torch.tensor(counts)) if max(counts) > 1 else None
    lengths = torch.from_numpy(np.concatenate([item.lengths for item in items]).astype(np.int64))
    return Ragged(values if values.ndim == 2 else values.long(), lengths, owners)


@contextmanager
def within_memory() -> Generator[None]:
    """Raise Unavailable where the device, or the host, has not the memory: with less beside it, it may have."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        failure = failure_of(error)
        if failure is None or failure.code != "out_of_memory":
            raise
        torch.cuda.empty_cache()
        raise Unavailable("the device has not the memory for this", code=failure.code) from error


@torch.inference_mode()
def encode(loaded: Loaded, modality: str, device: torch.device, batch: Ragged) -> torch.Tensor:
    """Encode a batch to vectors (item, dimensions), float32 on the device; of unit length for the cosine.

    Raises Unavailable if the device has not the memory for it.
    """
    with within_memory(), precision_of(loaded.recipe.precision, device):
        return loaded.model.encode(modality, batch.to(device))


def encode_items(
    loaded: Loaded, modality: str, device: torch.device, items: Sequence[Item]
) -> list[np.ndarray | Invalid]:
    """Encode items; one whose vector is not finite is answered with an error of its own."""
    vectors = encode(loaded, modality, device, gather(items)).cpu().numpy()
    finite = cast("list[bool]", np.isfinite(vectors).all(axis=1).tolist())
    return [
        vectors[at] if finite[at] else Invalid("the model's vector for this item is not finite", code="item_failed")
        for at in range(len(items))
    ]
