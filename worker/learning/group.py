"""Several processes that share every batch: each encodes its part, and all learn what one process would.

Each rank holds the whole model. A contrastive loss compares everything with everything, so the vectors of all ranks are
gathered; each computes the part of the loss whose anchors are its own, against the gathered vectors of the other side.
On the way back what the ranks leave at gathered vectors is summed and each takes its own rows, and the gradients of
parameters are averaged: the same gradient as of one process with the whole batch, but for rounding.

Rank 0 leads. It alone finds a checkpoint, learns tokenisers, saves, publishes and speaks to the supervisor; the others
are told the files of the tokenisers, and the state that they start from is copied to them. What a step draws (dropout)
follows from (seed, step, rank), so there are no generators to be saved.

This is not DistributedDataParallel: that averages during every backward pass, and gradient caching has one for each
micro-batch. One flat sum for each step serves both.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import torch
from torch import distributed

from service.contract.errors import Transient
from worker.learning.losses import Gathered
from worker.learning.reading import Share

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor, nn

    from worker.learning.checkpoints import Position

Files = dict[str, dict[str, bytes]]
STREAM: Final = 0xDD9  # keeps the seeds of the steps apart from the order of the batches
LOST: Final = "rank_lost"
_MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")


@final
@dataclass(frozen=True)
class Group:
    """The processes that train one model; of a single one every method leaves things as they are."""

    rank: int
    size: int
    store: distributed.Store | None  # pyright: ignore[reportPrivateImportUsage]
    """Through which they meet."""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """What of every batch is this rank's."""
        return Share(self.rank, self.size)

    def tokeniser_files(self, files: Files) -> Files:
        """Return the files that rank 0 gives."""
        if self.store is None:
            return files
        if self.leads:
            text = {name: {path: data.decode() for path, data in each.items()} for name, each in files.items()}
            self.store.set("tokenisers", json.dumps(text))
        text = json.loads(self.store.get("tokenisers"))
        return {name: {path: data.encode() for path, data in each.items()} for name, each in text.items()}

    def start(self, model: nn.Module, optimiser: torch.optim.Optimizer, position: Position) -> Position:
        """Copy weights and moments from rank 0 to the others, and return its position.

        Raises Transient if another rank is lost, as every method does that speaks to them.
        """
        if self.store is None:
            return position
        if self.leads:
            self.store.set("position", position.model_dump_json())
        position = type(position).model_validate_json(self.store.get("position"))
        with self._in_touch():
            for tensor in (*model.parameters(), *model.buffers()):
                distributed.broadcast(tensor.detach(), 0)
            parameters = [one for group in optimiser.param_groups for one in group["params"]]
            if self.leads:
                known = [at for at, one in enumerate(parameters) if one in optimiser.state]
                self.store.set("moments", json.dumps(known))
            for at in json.loads(self.store.get("moments")):
                one = parameters[at]
                if not self.leads:
                    optimiser.state[one] = {
                        "step": torch.zeros((), dtype=torch.float32, device=one.device),
                        "exp_avg": torch.zeros_like(one),
                        "exp_avg_sq": torch.zeros_like(one),
                    }
                for part in _MOMENTS:
                    distributed.broadcast(optimiser.state[one][part], 0)
        return position

    def seed_step(self, seed: int, step: int) -> None:
        """Let what a step draws follow from the step and the rank; a single process goes on with its generators."""
        if self.store is not None:
            (drawn,) = np.random.SeedSequence([seed, STREAM, step, self.rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(drawn))

    def gather(self, z_a: Tensor, z_b: Tensor) -> Gathered | None:
        """Return the vectors of all ranks, whose gradients find their way back; None for a single process."""
        if self.store is None:
            return None
        with self._in_touch():
            every_a, every_b = _Gather.apply(self, z_a, z_b)  # pyright: ignore[reportGeneralTypeIssues]
        return Gathered(every_a, every_b, self.rank * len(z_a))

    def average(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Average the gradients of parameters over the ranks; return the mean of the loss."""
        loss = loss.detach()
        if self.store is None:
            return loss
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([loss.reshape(1), *(grad.reshape(-1) for grad in grads)])
        with self._in_touch():
            distributed.all_reduce(flat)
        flat /= self.size
        at = 1
        for grad in grads:
            grad.copy_(flat[at : at + grad.numel()].view_as(grad))
            at += grad.numel()
        return flat[0]

    @contextmanager
    def _in_touch(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Transient(f"rank {self.rank} lost touch with the others", code=LOST) from error


ALONE: Final = Group(0, 1, None)


@final
class _Gather(torch.autograd.Function):
    """All ranks' vectors of both sides; in one function, so that all ranks go back in one order."""

    @staticmethod
    def forward(ctx: Any, group: Group, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.num_rows, ctx.dim = group, len(z_a), z_a.shape[1]
        own = torch.cat([z_a, z_b], dim=1).contiguous()  # (row, 2 dim)
        parts = [torch.empty_like(own) for _ in range(group.size)]
        distributed.all_gather(parts, own)
        every = torch.cat(parts)
        return every[:, : ctx.dim].contiguous(), every[:, ctx.dim :].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        group: Group = ctx.group
        every = torch.cat(grads, dim=1)
        with group._in_touch():  # noqa: SLF001
            distributed.all_reduce(every)
        own = every[group.rank * ctx.num_rows : (group.rank + 1) * ctx.num_rows]
        return None, own[:, : ctx.dim], own[:, ctx.dim :]
