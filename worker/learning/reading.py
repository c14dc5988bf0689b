"""Samples to batches of tokens, without torch: what the job's own process and its loader processes share.

A batch is a pure function of (seed, pair, visit): a resumed run sees what it would have seen. Steps are shared out
among the pairs: each step takes one batch of one pair, always the pair that is furthest behind its share. So memory
does not grow with the number of pairs, `weight` means exactly what the recipe says, and how often each pair was drawn
is the whole position of a run in its data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np

from service.contract.errors import IsthmusError, Permanent
from service.contract.modality import medium_of
from service.contract.tokens.tokenise import UNCHANGED, Change, Tokeniser, payload_to_raw
from worker.learning.augment import Augmenter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import Int64

    from service.contract.modality import Medium
    from service.contract.recipe import Recipe
    from service.contract.samples import Samples
    from worker.learning.ragged import Ragged

CACHE_BYTES: Final = 1 << 30  # tokens kept in memory by one job


@final
@dataclass(frozen=True)
class Dataset:
    """A data set as a job reads it."""

    name: str
    digest: str
    samples: Samples


@final
@dataclass(frozen=True)
class Share:
    """What one of several processes that train together takes of every batch: equal parts, in order."""

    rank: int
    size: int

    def rows(self, batch_size: int) -> slice:
        """Return the rows of a batch."""
        return slice(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)


WHOLE: Final = Share(0, 1)


@final
@dataclass(frozen=True)
class Packed:
    """The sequences of a batch's items end to end: their lengths, and how many each item has (None: one each)."""

    values: np.ndarray
    lengths: Int64[np.ndarray, " sequence"]
    counts: Int64[np.ndarray, " item"] | None


def pack(items: Sequence[Sequence[np.ndarray]]) -> Packed:
    """Lay the sequences of items, of one modality, end to end."""
    sequences = [sequence for item in items for sequence in item]
    counts = np.array([len(item) for item in items])
    return Packed(
        np.concatenate(sequences),
        np.array([len(sequence) for sequence in sequences]),
        None if (counts == 1).all() else counts,
    )


@final
class TokenSource:
    """The tokens of one modality of a data set, kept in memory once made, up to a limit in bytes."""

    def __init__(
        self,
        dataset: Dataset,
        modality: str,
        tokeniser: Tokeniser,
        cache_bytes: int = 0,
        augmenter: Augmenter | None = None,
    ) -> None:
        """Check that the two fit.

        Raises Permanent if the data set has no such modality, or another medium than the tokeniser reads.
        """
        self.dataset = dataset
        self.modality = modality
        self.tokeniser = tokeniser
        self.medium: Medium = medium_of(tokeniser.config)
        self._augmenter = augmenter
        self._kept: dict[int, list[np.ndarray]] = {}
        self.is_changed = augmenter is not None and augmenter.changes_media
        """Whether training alters the medium itself, so that it is decoded anew in every epoch."""
        self._room_bytes = 0 if self.is_changed else cache_bytes
        known = dataset.samples.modalities
        if modality not in known:
            raise Permanent(f"data set {dataset.name} has no modality {modality!r}; it has {', '.join(known)}")
        if known[modality] != self.medium:
            raise Permanent(
                f"{modality!r} is {known[modality]} in data set {dataset.name}, the model's tower reads {self.medium}"
            )

    def __call__(self, indices: Int64[np.ndarray, " item"]) -> Ragged:
        """Tokenise samples as they are; text that is too long is cut.

        Raises Permanent that names the sample if one does not fit the recipe.
        """
        from worker.learning.ragged import Ragged  # noqa: PLC0415  # loader processes do without torch

        return Ragged.from_packed(self.packed(indices))

    def packed(self, indices: Int64[np.ndarray, " item"], epoch: int | None = None) -> Packed:
        """Tokenise samples, as the recipe alters them in an epoch; None: as they are.

        Raises Permanent that names the sample if one does not fit the recipe.
        """
        if epoch is None or self._augmenter is None:
            return pack([self._sequences(index) for index in indices.tolist()])
        return pack([self._altered(index, epoch, self._augmenter) for index in indices.tolist()])

    def _sequences(self, index: int) -> list[np.ndarray]:
        if (kept := self._kept.get(index)) is not None:
            return kept
        sequences = self._tokenised(index, UNCHANGED)
        num_bytes = sum(sequence.nbytes for sequence in sequences)
        if num_bytes <= self._room_bytes:
            self._room_bytes -= num_bytes
            self._kept[index] = sequences
        return sequences

    def _altered(self, index: int, epoch: int, augmenter: Augmenter) -> list[np.ndarray]:
        rng = augmenter.generator(epoch, index)
        plain = self._tokenised(index, augmenter.change(rng)) if augmenter.changes_media else self._sequences(index)
        return augmenter.altered(plain, rng)

    def _tokenised(self, index: int, change: Change) -> list[np.ndarray]:
        samples = self.dataset.samples
        try:
            raw = payload_to_raw(self.medium, samples.payload(self.modality, index))
            return self.tokeniser(raw, truncate=True, change=change)
        except IsthmusError as error:
            where = f"sample {samples.key(index)!r} of data set {self.dataset.name}, {self.modality}"
            raise Permanent(f"{where}: {error.message}") from error


@final
class PairData:
    """The training samples of one pair of a recipe, in an order for every epoch."""

    def __init__(
        self,
        position: int,
        recipe: Recipe,
        sources: tuple[TokenSource, TokenSource],
        batch_size: int,
        share: Share = WHOLE,
    ) -> None:
        """Find the training samples.

        Raises Permanent if there are fewer than a batch holds.
        """
        self.modalities = recipe.pairs[position].modalities
        self.weight = recipe.pairs[position].weight
        self.dataset = sources[0].dataset
        self.sources = sources
        self.batch_size = batch_size
        self.indices = self.dataset.samples.indices("train")
        self._share = share
        self._seed = (recipe.seed, position)
        self._order: tuple[int, Int64[np.ndarray, " sample"]] | None = None
        if len(self.indices) < batch_size:
            raise Permanent(
                f"pairs[{position}]: data set {self.dataset.name} has {len(self.indices)} training samples, fewer than "
                f"batch_size {batch_size}"
            )

    def batch_indices(self, visit: int) -> Int64[np.ndarray, " item"]:
        """Return the samples of visit 0, 1, ...; the rest of an epoch that fills no batch is dropped."""
        epoch, at = self._place(visit)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([*self._seed, epoch]).permutation(self.indices))
        return self._order[1][at * self.batch_size : (at + 1) * self.batch_size]

    @property
    def num_rows(self) -> int:
        """Rows of a batch that are this process's share."""
        rows = self._share.rows(self.batch_size)
        return rows.stop - rows.start

    def batch(self, visit: int, piece: Share = WHOLE) -> tuple[Packed, Packed]:
        """Return the tokens of a visit, row by row the same samples: this process's share, or a piece of it."""
        indices = self.batch_indices(visit)[self._share.rows(self.batch_size)][piece.rows(self.num_rows)]
        epoch, _ = self._place(visit)
        return self.sources[0].packed(indices, epoch), self.sources[1].packed(indices, epoch)

    def _place(self, visit: int) -> tuple[int, int]:
        """Return the epoch of a visit, and which of its batches it is."""
        return divmod(visit, len(self.indices) // self.batch_size)


def open_pairs(
    recipe: Recipe,
    datasets: Mapping[str, Dataset],
    tokenisers: Mapping[str, Tokeniser],
    batch_size: int,
    *,
    share: Share = WHOLE,
    cache_bytes: int = CACHE_BYTES,
) -> list[PairData]:
    """Open the pairs of a recipe; what two of them read of one data set is tokenised once."""
    wanted = sorted({(pair.dataset, modality) for pair in recipe.pairs for modality in pair.modalities})
    augmenters = {
        modality: Augmenter(tower.augment, tower.tokens, recipe.seed, modality)
        for modality, tower in recipe.towers.items()
        if tower.augment is not None
    }
    sources = {
        (name, modality): TokenSource(
            datasets[name], modality, tokenisers[modality], cache_bytes // len(wanted), augmenters.get(modality)
        )
        for name, modality in wanted
    }
    return [
        PairData(
            position,
            recipe,
            (sources[pair.dataset, pair.modalities[0]], sources[pair.dataset, pair.modalities[1]]),
            batch_size,
            share,
        )
        for position, pair in enumerate(recipe.pairs)
    ]


def next_pair(drawn: Sequence[int], weights: Sequence[float]) -> int:
    """Return the pair that is furthest behind its share of the steps; the first of equals."""
    return min(range(len(drawn)), key=lambda at: (drawn[at] + 0.5) / weights[at])
