"""Which items of a batch are encoded together: as few padded tokens as it takes, and never more items than asked for.

A batch of sequences is padded to its longest one, and a caption of five words beside one of fifty is nine tenths
padding. Sorted by length and cut into a few groups, most of that is never computed. The vectors are the same but for
rounding, and the loss is none the wiser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

    from worker.learning.ragged import Ragged

CPU_TOKENS: Final = 4096
CUDA_TOKENS: Final = 32_768
"""What one more call of a tower costs, in padded tokens: its kernels are launched whatever they compute."""
LEAST_SHARE: Final = 0.2  # of the padded tokens; to save less is not worth another order of rounding
PLACES: Final = 32  # where a sorted batch may be cut


@final
class Lengths:
    """How many sequences each item of a batch has, and how long its longest is; in tokens."""

    def __init__(self, batch: Ragged) -> None:
        lengths = batch.lengths.numpy()
        if batch.owners is None:
            self.counts, self.longest = np.ones_like(lengths), lengths
        else:
            owners = batch.owners.numpy()
            self.counts = np.bincount(owners)
            self.longest = np.maximum.reduceat(lengths, np.cumsum(self.counts) - self.counts)
        self.num_tokens = int(lengths.sum())

    def padded(self, items: Int64[np.ndarray, " item"]) -> int:
        """Count the tokens of some items, encoded together."""
        return int(self.counts[items].sum() * self.longest[items].max())


def plan(lengths: Lengths, micro_batch: int | None, call_tokens: int = CPU_TOKENS) -> list[Int64[Tensor, " item"]]:
    """Share out the items of a batch among calls of its tower; [] for one call with the batch as it is.

    Depends on the lengths alone, so a batch is encoded alike whenever it is. `call_tokens` is what a call costs.
    """
    num_items = len(lengths.longest)
    order = np.argsort(lengths.longest, kind="stable")
    everything = np.arange(num_items)
    if micro_batch is not None and micro_batch < num_items:
        plain, by_length = (_pieces(items, micro_batch) for items in (everything, order))
        parts = by_length if _saves(lengths, plain, by_length) else plain
        return [torch.from_numpy(part) for part in parts]
    groups = _groups(lengths, order, call_tokens)
    if len(groups) == 1 or not _saves(lengths, [everything], groups):
        return []
    return [torch.from_numpy(group) for group in groups]


def padded_tokens(lengths: Lengths, parts: list[Int64[Tensor, " item"]]) -> int:
    """Count the tokens that a plan makes a tower compute."""
    if not parts:
        return lengths.padded(np.arange(len(lengths.longest)))
    return sum(lengths.padded(part.numpy()) for part in parts)


def _pieces(items: Int64[np.ndarray, " item"], size: int) -> list[Int64[np.ndarray, " item"]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _saves(lengths: Lengths, plain: list[np.ndarray], other: list[np.ndarray]) -> bool:
    before, after = (sum(map(lengths.padded, parts)) for parts in (plain, other))
    return before - after >= LEAST_SHARE * before


def _groups(lengths: Lengths, order: Int64[np.ndarray, " item"], call_tokens: int) -> list[Int64[np.ndarray, " item"]]:
    """Cut the sorted items where that is cheapest, each call counted as so many tokens; by dynamic programming."""
    places = np.unique(np.linspace(0, len(order), min(PLACES, len(order)) + 1).astype(np.int64)).tolist()
    sequences = np.concatenate([[0], np.cumsum(lengths.counts[order])])[places]
    longest = lengths.longest[order][np.asarray(places[1:]) - 1]  # of the items before each place but the first
    best: list[float] = [0.0]
    came_from: list[int] = [0]
    for end in range(1, len(places)):
        costs = np.asarray(best) + (sequences[end] - sequences[:end]) * longest[end - 1] + call_tokens
        came_from.append(int(costs.argmin()))
        best.append(float(costs.min()))
    groups: list[Int64[np.ndarray, " item"]] = []
    end = len(places) - 1
    while end:
        start = came_from[end]
        groups.append(order[places[start] : places[end]])
        end = start
    return groups[::-1]
