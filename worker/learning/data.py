"""Data sets to batches. A batch is a pure function of (seed, pair, visit): a resumed run sees what it would have seen.

Steps are shared out among the pairs: each step takes one batch of one pair, always the pair that is furthest behind its
share. So memory does not grow with the number of pairs, `weight` means exactly what the recipe says, and how often each
pair was drawn is the whole position of the loader.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from service.contract.errors import IsthmusError, Permanent
from service.contract.modality import AudioTokens, ContinuousTokens, TextTokens, medium_of
from service.contract.samples import Samples
from service.contract.tokens import text
from service.contract.tokens.tokenise import Tokeniser, payload_to_raw
from worker.learning.device import precision_of
from worker.learning.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence

    from jaxtyping import Float, Int64
    from torch import Tensor

    from service.contract.modality import Medium
    from service.contract.recipe import Recipe
    from service.contract.samples import Split
    from worker.learning.model import MultiTower
    from worker.runner import Context

CACHE_BYTES: Final = 1 << 30  # tokens kept in memory by one job
BATCHES_AHEAD: Final = 2
MAX_CAPTIONS: Final = 1_000_000  # read to train a tokeniser; more change no merge worth having
MEASURED_SAMPLES: Final = 1024
ENCODE_BATCH: Final = 256


@final
@dataclass(frozen=True)
class Dataset:
    """A data set as a job reads it."""

    name: str
    digest: str
    samples: Samples


def open_dataset(name: str, ctx: Context) -> Dataset:
    """Open a data set that is among the job's inputs."""
    given = ctx.inputs[name]
    return Dataset(name, given["digest"], Samples(ctx.store.local(given["artifact"])))


@final
class TokenSource:
    """The tokens of one modality of a data set, kept in memory once made, up to a limit in bytes."""

    def __init__(self, dataset: Dataset, modality: str, tokeniser: Tokeniser, cache_bytes: int = 0) -> None:
        """Check that the two fit.

        Raises Permanent if the data set has no such modality, or another medium than the tokeniser reads.
        """
        self.dataset = dataset
        self.modality = modality
        self.tokeniser = tokeniser
        self.medium: Medium = medium_of(tokeniser.config)
        self._kept: dict[int, list[np.ndarray]] = {}
        self._room_bytes = cache_bytes
        known = dataset.samples.modalities
        if modality not in known:
            raise Permanent(f"data set {dataset.name} has no modality {modality!r}; it has {', '.join(known)}")
        if known[modality] != self.medium:
            raise Permanent(
                f"{modality!r} is {known[modality]} in data set {dataset.name}, the model's tower reads {self.medium}"
            )

    def __call__(self, indices: Int64[np.ndarray, " item"]) -> Ragged:
        """Tokenise samples; text that is too long is cut.

        Raises Permanent that names the sample if one does not fit the recipe.
        """
        return Ragged.from_sequences([self._sequences(index) for index in indices.tolist()])

    def _sequences(self, index: int) -> list[np.ndarray]:
        if (kept := self._kept.get(index)) is not None:
            return kept
        samples = self.dataset.samples
        try:
            raw = payload_to_raw(self.medium, samples.payload(self.modality, index))
            sequences = self.tokeniser(raw, truncate=True)
        except IsthmusError as error:
            where = f"sample {samples.key(index)!r} of data set {self.dataset.name}, {self.modality}"
            raise Permanent(f"{where}: {error.message}") from error
        num_bytes = sum(sequence.nbytes for sequence in sequences)
        if num_bytes <= self._room_bytes:
            self._room_bytes -= num_bytes
            self._kept[index] = sequences
        return sequences


@final
class PairData:
    """The training samples of one pair of a recipe, in an order for every epoch."""

    def __init__(
        self, position: int, recipe: Recipe, sources: tuple[TokenSource, TokenSource], batch_size: int
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
        self._seed = (recipe.seed, position)
        self._order: tuple[int, Int64[np.ndarray, " sample"]] | None = None
        if len(self.indices) < batch_size:
            raise Permanent(
                f"pairs[{position}]: data set {self.dataset.name} has {len(self.indices)} training samples, fewer than "
                f"batch_size {batch_size}"
            )

    def batch_indices(self, visit: int) -> Int64[np.ndarray, " item"]:
        """Return the samples of visit 0, 1, ...; the rest of an epoch that fills no batch is dropped."""
        epoch, at = divmod(visit, len(self.indices) // self.batch_size)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([*self._seed, epoch]).permutation(self.indices))
        return self._order[1][at * self.batch_size : (at + 1) * self.batch_size]

    def batch(self, visit: int) -> tuple[Ragged, Ragged]:
        """Return the tokens of a visit, row by row the same samples."""
        indices = self.batch_indices(visit)
        return self.sources[0](indices), self.sources[1](indices)


def open_pairs(
    recipe: Recipe, datasets: Mapping[str, Dataset], tokenisers: Mapping[str, Tokeniser], batch_size: int
) -> list[PairData]:
    """Open the pairs of a recipe; what two of them read of one data set is tokenised once."""
    wanted = {(pair.dataset, modality) for pair in recipe.pairs for modality in pair.modalities}
    sources = {
        (name, modality): TokenSource(datasets[name], modality, tokenisers[modality], CACHE_BYTES // len(wanted))
        for name, modality in sorted(wanted)
    }
    return [
        PairData(
            position,
            recipe,
            (sources[pair.dataset, pair.modalities[0]], sources[pair.dataset, pair.modalities[1]]),
            batch_size,
        )
        for position, pair in enumerate(recipe.pairs)
    ]


def next_pair(drawn: Sequence[int], weights: Sequence[float]) -> int:
    """Return the pair that is furthest behind its share of the steps; the first of equals."""
    return min(range(len(drawn)), key=lambda at: (drawn[at] + 0.5) / weights[at])


def batches(pairs: Sequence[PairData], drawn: Sequence[int]) -> Generator[tuple[int, Ragged, Ragged]]:
    """Yield (pair, first, second) for ever, from the position `drawn` on; a thread prepares the next ones meanwhile."""
    ahead: deque[tuple[int, Future[tuple[Ragged, Ragged]]]] = deque()
    position = list(drawn)
    weights = [pair.weight for pair in pairs]
    pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        while True:
            while len(ahead) < BATCHES_AHEAD:
                at = next_pair(position, weights)
                ahead.append((at, pool.submit(pairs[at].batch, position[at])))
                position[at] += 1
            at, future = ahead.popleft()
            first, second = future.result()
            yield at, first, second
    finally:
        pool.shutdown(cancel_futures=True)


def train_tokenisers(recipe: Recipe, datasets: Mapping[str, Dataset]) -> dict[str, dict[str, bytes]]:
    """Train the tokeniser of each text modality on the captions of its training samples; return its files.

    A tower that starts from another one keeps the tokeniser of that.
    """
    files: dict[str, dict[str, bytes]] = {}
    for modality, tower in sorted(recipe.towers.items()):
        if isinstance(tower.tokens, TextTokens) and tower.init_from is None:
            names = dict.fromkeys(pair.dataset for pair in recipe.pairs if modality in pair.modalities)
            files[modality] = text.train(_captions(modality, [datasets[name].samples for name in names]), tower.tokens)
    return files


def _captions(modality: str, all_samples: Sequence[Samples]) -> Iterator[str]:
    for samples in all_samples:
        if samples.modalities.get(modality) == "text":
            for index in samples.indices("train")[: MAX_CAPTIONS // len(all_samples)].tolist():
                yield samples.payload(modality, index).decode()


def measure(model: MultiTower, pairs: Sequence[PairData], passed_over: Container[str] = ()) -> None:
    """Measure the mean and deviation of each tower that reads sound or the caller's vectors, on training samples.

    Those that are passed over know theirs already, from the model that they start from.
    """
    for modality, tower in model.towers.items():
        if modality in passed_over:
            continue
        sources = [
            (source, pair)
            for pair in pairs
            for source in pair.sources
            if source.modality == modality and isinstance(source.tokeniser.config, AudioTokens | ContinuousTokens)
        ]
        if sources:
            num_samples = max(1, MEASURED_SAMPLES // len(sources))
            drawn = [
                source(np.random.default_rng(0).permutation(pair.indices)[:num_samples]) for source, pair in sources
            ]
            tower.measure(torch.cat([batch.values for batch in drawn]))


def draw(samples: Samples, split: Split, limit: int, seed: int) -> Int64[np.ndarray, " item"]:
    """Draw at most `limit` samples of a split without replacement, ascending."""
    indices = samples.indices(split)
    if len(indices) <= limit:
        return indices
    return np.sort(np.random.default_rng(seed).choice(indices, limit, replace=False))


@final
@dataclass(frozen=True)
class Encoder:
    """Embeds samples with a model; `after_batch` hears how many each batch had, and may raise to stop the work."""

    model: MultiTower
    device: torch.device
    after_batch: Callable[[int], None]

    @torch.inference_mode()
    def encode(self, modality: str, batch: Ragged) -> Float[Tensor, "item dim"]:
        """Return the unit vectors of items that are tokens already, on the CPU."""
        with precision_of(self.model.precision, self.device):
            return self.model.encode(modality, batch.to(self.device)).cpu()

    def in_batches(
        self, source: TokenSource, indices: Int64[np.ndarray, " item"], batch_size: int = ENCODE_BATCH
    ) -> Iterator[Float[Tensor, "item dim"]]:
        """Yield the unit vectors of samples, batch by batch, on the CPU."""
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            yield self.encode(source.modality, source(chunk))
            self.after_batch(len(chunk))

    def __call__(self, source: TokenSource, indices: Int64[np.ndarray, " item"]) -> Float[Tensor, "item dim"]:
        """Return the unit vectors of samples, on the CPU."""
        return torch.cat(list(self.in_batches(source, indices)))


@final
@dataclass(frozen=True)
class Evaluated:
    """The samples of a data set that an evaluation looks at: their labels (empty: none), and vectors by modality."""

    dataset: Dataset
    indices: Int64[np.ndarray, " item"]
    labels: list[str]
    vectors: dict[str, Float[Tensor, "item dim"]]
