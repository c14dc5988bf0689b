"""Encode a batch in parts, and take the gradient of the whole batch all the same.

In groups, because sequences of one length need no padding: nothing else changes, the graph is that of all parts.

In micro-batches (gradient caching, Gao et al. 2021, arXiv 2101.06983), because the graph of a whole batch does not fit.
A contrastive loss couples all items of a batch, so gradients of micro-batches do not add up to it. But it couples them
through their vectors alone: encode without keeping graphs, let the loss leave its gradient at the vectors, then encode
each micro-batch again, with its graph, and propagate its rows. Memory holds one graph at a time, for one more forward
pass. What was drawn the first time (dropout) is drawn again: each micro-batch starts from the generators' states that
it started from before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, Int64
    from torch import Tensor

    from worker.learning.ragged import Ragged


@final
@dataclass(frozen=True)
class Generators:
    """States of torch's generators: of the CPU, and of the device if that is another."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def now(device: torch.device) -> Generators:
        """Return the present states."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return Generators(device, torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Let what is drawn next be what was drawn then."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


@final
@dataclass(frozen=True)
class Encoded:
    """The vectors of one side of a batch. Call `backward` once a loss has left its gradient at them."""

    z: Float[Tensor, "item dim"]
    _again: list[Callable[[], None]] = field(default_factory=list["Callable[[], None]"])

    def backward(self) -> None:
        """Carry the gradient at the vectors on into the tower, if they have no graph of their own."""
        for propagate in self._again:
            propagate()


def encode(
    run: Callable[[Ragged], Float[Tensor, "item dim"]],
    batch: Ragged,
    parts: Sequence[Int64[Tensor, " item"]],
    device: torch.device,
    *,
    learns: bool,
    cached: bool,
    draws: bool,
) -> Encoded:
    """Encode a batch part by part; `run` turns a part into vectors, `parts` shares out the items, [] for as it is.

    `learns` is false for a tower that is locked: then there is no graph. `cached` keeps none until `backward`. `draws`
    says that the tower draws random numbers: it then runs the first time as it will the second time, with a graph that
    is dropped at once, since kernels chosen without one may draw others.
    """
    if not learns:
        with torch.no_grad():
            return Encoded(_in_order([run(part) for part in _cut(batch, parts)], parts))
    if not cached or not parts:
        return Encoded(_in_order([run(part) for part in _cut(batch, parts)], parts))
    states: list[Generators] = []
    vectors: list[Tensor] = []
    with torch.set_grad_enabled(draws):
        for items in parts:
            states.append(Generators.now(device))
            vectors.append(run(batch.take(items)).detach())
    z = _in_order(vectors, parts).requires_grad_()

    def propagate() -> None:
        assert z.grad is not None, "the loss must be propagated before"
        after = Generators.now(device)
        for items, state in zip(parts, states, strict=True):
            state.restore()
            run(batch.take(items)).backward(z.grad[items.to(z.device)])
        after.restore()

    return Encoded(z, [propagate])


def _cut(batch: Ragged, parts: Sequence[Int64[Tensor, " item"]]) -> list[Ragged]:
    return [batch.take(items) for items in parts] if parts else [batch]


def _in_order(
    vectors: Sequence[Float[Tensor, "part dim"]], parts: Sequence[Int64[Tensor, " item"]]
) -> Float[Tensor, "item dim"]:
    if not parts:
        return vectors[0]
    z = torch.cat(list(vectors))
    places = torch.empty(len(z), dtype=torch.int64)
    places[torch.cat(list(parts))] = torch.arange(len(z))
    return z[places.to(z.device)]
