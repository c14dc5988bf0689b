"""What every part of an evaluation reads, and where it says what it could not measure."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, final

import numpy as np
import torch

from worker.jobs.report import LeftOut
from worker.learning import critics
from worker.learning.data import Encoder, Evaluated, TokenSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, Int64
    from torch import Tensor

    from service.contract.jobs import EvaluateArgs, Part
    from worker.learning.data import Dataset
    from worker.learning.model import Loaded
    from worker.runner import Context


@final
class Progress:
    """Counts embedded samples against what is known to be needed, which grows as the parts begin."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._started = time.monotonic()
        self._done = self._total = 0

    def expect(self, num_items: int) -> None:
        """Add samples to what is needed."""
        self._total += num_items

    def __call__(self, num_items: int) -> None:
        """Count embedded samples; raises if the work is to stop."""
        self._done += num_items
        self._ctx.check()
        left = max(0, self._total - self._done)
        self._ctx.progress(self._done, self._total, left * (time.monotonic() - self._started) / max(1, self._done))


@final
@dataclass(frozen=True)
class Scope:
    """An evaluation at work."""

    args: EvaluateArgs
    ks: list[int]
    loaded: Loaded
    ctx: Context
    encoder: Encoder
    progress: Progress
    evaluated: list[Evaluated]
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])

    def wants(self, part: Part) -> bool:
        """Tell whether a part is to be measured."""
        return self.args.parts is None or part in self.args.parts

    def leave_out(self, part: Part, dataset: str | None, of: str, reason: str) -> None:
        """Note what a wanted part cannot measure, and why."""
        if self.wants(part):
            self.left_out.append(LeftOut(part=part, dataset=dataset, of=of, reason=reason))

    def encode(self, dataset: Dataset, modality: str, indices: Int64[np.ndarray, " item"]) -> Float[Tensor, "item dim"]:
        """Embed samples of a data set."""
        self.progress.expect(len(indices))
        return self.encoder(TokenSource(dataset, modality, self.loaded.tokenisers[modality]), indices)

    def scores(self, z_a: Float[Tensor, "row dim"], z_b: Float[Tensor, "column dim"]) -> Float[Tensor, "row column"]:
        """Compare vectors as the model does, without the scale."""
        return critics.scores(self.loaded.recipe.critic, z_a, z_b)

    def pairs(self) -> Iterator[tuple[Evaluated, str, str]]:
        """Yield every two modalities that a data set holds together."""
        for one in self.evaluated:
            for first, second in combinations(sorted(one.vectors), 2):
                self.ctx.check()
                yield one, first, second

    def shuffled(self, num_items: int, limit: int | None = None) -> Int64[Tensor, " item"]:
        """Return positions in a random order of the evaluation's seed, at most `limit`."""
        return torch.from_numpy(np.random.default_rng(self.args.seed).permutation(num_items)[:limit])
