"""Sequences of unequal length as one block of memory: what towers read, banks keep and the wire carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from worker.learning.reading import Packed


@final
@dataclass(frozen=True)
class Ragged:
    """Token sequences end to end, and the item that each belongs to.

    `values` holds ids (token,) int64 or vectors (token, dim) uint8 or float32. `lengths` (sequence,) and `owners`
    (sequence,), ascending from 0 without gaps, are int64 and stay on the CPU, where the shapes of batches are decided;
    `owners` is None if every item is one sequence.
    """

    values: Tensor
    lengths: Int[Tensor, " sequence"]
    owners: Int[Tensor, " sequence"] | None = None

    @staticmethod
    def from_sequences(items: Sequence[Sequence[np.ndarray]]) -> Ragged:
        """Lay the sequences of items, of one modality, end to end."""
        sequences = [sequence for item in items for sequence in item]
        owners = None
        if any(len(item) != 1 for item in items):
            counts = torch.tensor([len(item) for item in items])
            owners = torch.repeat_interleave(torch.arange(len(items)), counts)
        values = torch.from_numpy(np.concatenate(sequences))
        return Ragged(
            values=values if values.ndim == 2 else values.long(),
            lengths=torch.tensor([len(sequence) for sequence in sequences]),
            owners=owners,
        )

    @staticmethod
    def from_packed(packed: Packed) -> Ragged:
        """Take over arrays that lie end to end already; nothing is copied but ids."""
        owners = None
        if packed.counts is not None:
            owners = torch.repeat_interleave(torch.arange(len(packed.counts)), torch.from_numpy(packed.counts))
        values = torch.from_numpy(packed.values)
        return Ragged(values if values.ndim == 2 else values.long(), torch.from_numpy(packed.lengths), owners)

    @property
    def num_items(self) -> int:
        """Items in the batch."""
        return len(self.lengths) if self.owners is None else int(self.owners[-1]) + 1

    def to(self, device: torch.device | str) -> Ragged:
        """Move the values; lengths and owners stay on the CPU."""
        return Ragged(self.values.to(device, non_blocking=True), self.lengths, self.owners)

    def is_equal_length(self) -> bool:
        """Tell whether all sequences have one length, so that no mask is needed."""
        return bool((self.lengths == self.lengths[0]).all())

    def pad(self) -> tuple[Tensor, Bool[Tensor, "sequence token"]]:
        """Return the sequences padded with zeros to (sequence, token[, dim]), and the mask of what is real."""
        longest = int(self.lengths.max())
        shape = (len(self.lengths), longest, *self.values.shape[1:])
        if self.is_equal_length():
            mask = torch.ones(shape[:2], dtype=torch.bool, device=self.values.device)
            return self.values.reshape(shape), mask
        # A gather by an index made on the CPU: writing through a boolean mask would wait for the GPU.
        offsets = torch.arange(longest)
        mask = offsets < self.lengths[:, None]  # (sequence, token)
        starts = self.lengths.cumsum(0) - self.lengths
        index = (starts[:, None] + offsets).masked_fill(~mask, 0).to(self.values.device, non_blocking=True)
        mask = mask.to(self.values.device, non_blocking=True)
        padded = self.values[index]  # (sequence, token[, dim])
        return padded.masked_fill(~(mask if padded.ndim == 2 else mask[..., None]), 0), mask

    def take(self, items: Sequence[int] | Int[Tensor, " item"]) -> Ragged:
        """Return some of the items, in the order asked for, repeats included."""
        chosen = torch.as_tensor(items)
        owners = None
        if self.owners is not None:
            counts = torch.bincount(self.owners)
            firsts = counts.cumsum(0) - counts
            owners = torch.repeat_interleave(torch.arange(len(chosen)), counts[chosen])
            chosen = _ranges(firsts[chosen], counts[chosen])
        starts = self.lengths.cumsum(0) - self.lengths
        index = _ranges(starts[chosen], self.lengths[chosen])
        return Ragged(self.values[index.to(self.values.device)], self.lengths[chosen], owners)


def _ranges(starts: Int[Tensor, " range"], lengths: Int[Tensor, " range"]) -> Int[Tensor, " entry"]:
    """Return start, start + 1, ... of each range, end to end."""
    ends = lengths.cumsum(0)
    return torch.repeat_interleave(starts - (ends - lengths), lengths) + torch.arange(int(ends[-1]))
