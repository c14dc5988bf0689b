"""One side of a batch after another through its tower, in as many parts as the recipe and the lengths ask for."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

from service.contract.towers import PretrainedTower
from worker.learning import caching, grouping
from worker.learning.caching import Encoded

if TYPE_CHECKING:
    from collections.abc import Generator
    from contextlib import AbstractContextManager

    import torch
    from torch import Tensor

    from service.contract.recipe import Recipe
    from worker.learning.model import MultiTower
    from worker.learning.ragged import Ragged


@final
class BatchEncoder:
    """Encodes training batches; counts the tokens that it is given, and those that padding adds."""

    def __init__(
        self, model: MultiTower, recipe: Recipe, device: torch.device, autocast: AbstractContextManager[object]
    ) -> None:
        self.num_tokens = 0
        self.num_padded = 0
        self._model = model
        self._device = device
        self._autocast = autocast
        self._call_tokens = grouping.CUDA_TOKENS if device.type == "cuda" else grouping.CPU_TOKENS
        self._micro_batch = recipe.compute.micro_batch if recipe.compute else None
        self._draws = {
            name: not tower.locked if isinstance(tower, PretrainedTower) else tower.dropout > 0
            for name, tower in recipe.towers.items()
        }
        self._learns = {
            name: any(parameter.requires_grad for parameter in tower.parameters())
            for name, tower in model.towers.items()
        }

    def __call__(self, modality: str, batch: Ragged) -> Encoded:
        """Encode one side of a batch; its `backward` is due after the loss's."""
        lengths = grouping.Lengths(batch)
        parts = grouping.plan(lengths, self._micro_batch, self._call_tokens)
        self.num_tokens += lengths.num_tokens
        self.num_padded += grouping.padded_tokens(lengths, parts)

        def run(part: Ragged) -> Tensor:
            with self._autocast:
                return self._model.encode(modality, part.to(self._device))

        return caching.encode(
            run,
            batch,
            parts,
            self._device,
            learns=self._learns[modality],
            cached=self._micro_batch is not None,
            draws=self._draws[modality],
        )


@final
class Pace:
    """How fast a run goes, from one look at it to the next."""

    def __init__(self, step: int, encode: BatchEncoder) -> None:
        self._encode = encode
        self._restart(step)

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Count the time inside as time in which the device had nothing to do."""
        since = time.monotonic()
        yield
        self._waited_s += time.monotonic() - since

    def look(self, step: int, batch_size: int) -> dict[str, float]:
        """Return steps and samples per second since the last look, and the shares of waiting and of padding."""
        elapsed_s = time.monotonic() - self._time
        steps_per_s = (step - self._step) / elapsed_s
        figures = {
            "steps_per_s": steps_per_s,
            "samples_per_s": steps_per_s * batch_size,
            "wait_share": self._waited_s / elapsed_s,
            "padded_share": 1 - self._encode.num_tokens / self._encode.num_padded,
        }
        self._restart(step)
        return figures

    def _restart(self, step: int) -> None:
        self._time, self._step, self._waited_s = time.monotonic(), step, 0.0
        self._encode.num_tokens = self._encode.num_padded = 0
