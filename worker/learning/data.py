"""What a job does with data sets besides reading batches: open them, teach tokenisers, measure, draw, encode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from service.contract.modality import AudioTokens, ContinuousTokens, TextTokens
from service.contract.samples import Samples
from service.contract.tokens import text
from worker.learning.device import precision_of
from worker.learning.reading import Dataset, PairData, TokenSource
from worker.learning.towers.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Mapping, Sequence

    from jaxtyping import Float, Int64
    from torch import Tensor

    from service.contract.recipe import Recipe
    from service.contract.samples import Split
    from worker.learning.model import MultiTower
    from worker.learning.ragged import Ragged
    from worker.runner import Context

MAX_CAPTIONS: Final = 1_000_000  # read to train a tokeniser; more change no merge worth having
MEASURED_SAMPLES: Final = 1024
ENCODE_BATCH: Final = 256


def open_dataset(name: str, ctx: Context) -> Dataset:
    """Open a data set that is among the job's inputs."""
    given = ctx.inputs[name]
    return Dataset(name, given["digest"], Samples(ctx.store.local(given["artifact"])))


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
            assert isinstance(tower, Transformer), "imported towers start from a model"
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
        """Return the vectors of items that are tokens already, on the CPU."""
        with precision_of(self.model.precision, self.device):
            return self.model.encode(modality, batch.to(self.device)).cpu()

    def in_batches(
        self, source: TokenSource, indices: Int64[np.ndarray, " item"], batch_size: int = ENCODE_BATCH
    ) -> Iterator[Float[Tensor, "item dim"]]:
        """Yield the vectors of samples, batch by batch, on the CPU."""
        for start in range(0, len(indices), batch_size):
            chunk = indices[start : start + batch_size]
            yield self.encode(source.modality, source(chunk))
            self.after_batch(len(chunk))

    def __call__(self, source: TokenSource, indices: Int64[np.ndarray, " item"]) -> Float[Tensor, "item dim"]:
        """Return the vectors of samples, on the CPU."""
        return torch.cat(list(self.in_batches(source, indices)))


@final
@dataclass(frozen=True)
class Evaluated:
    """The samples of a data set that an evaluation looks at: their labels (empty: none), and vectors by modality."""

    dataset: Dataset
    indices: Int64[np.ndarray, " item"]
    labels: list[str]
    vectors: dict[str, Float[Tensor, "item dim"]]
