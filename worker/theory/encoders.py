"""The small encoders of the experiments, trained with the losses that jobs train with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from torch import nn

from service.contract.losses import Critic, InfoNCE, Loss, Scaled, Square
from worker.learning import critics, losses

if TYPE_CHECKING:
    from jaxtyping import Float, Float64
    from torch import Tensor

    from worker.theory.generators import Pairs

CHECK_EVERY: Final = 200


@final
@dataclass(frozen=True)
class Plan:
    """How to train."""

    loss: Loss
    steps: int
    batch_size: int = 64
    dimensions: int = 32
    hidden: int | None = None
    """Width of the one hidden layer (ReLU); None: linear encoders, as in the paper's case study."""
    learning_rate: float = 1e-2


@final
@dataclass(frozen=True)
class Encoders:
    """A trained encoder per modality, and how their vectors are compared."""

    g: nn.Module
    h: nn.Module
    critic: Critic
    scale: float
    """1 / temperature."""

    def scores(
        self,
        x: Float64[Tensor, "row observed_x"],
        y: Float64[Tensor, "column observed_y"],
        critic: Critic | None = None,
    ) -> Float[Tensor, "row column"]:
        """Compare every x with every y, without the scale, in float64."""
        how = critic or self.critic
        return critics.scores(how, *self._vectors(x, y, how))

    def batch_scores(self, pairs: Pairs, batch_size: int) -> Float[Tensor, "batch row column"]:
        """Compare every x with every y of its batch, batches being consecutive pairs, without the scale, in float64."""
        sides = critics.as_inner_products(self.critic, *self._vectors(pairs.x, pairs.y, self.critic))
        z_x, z_y = (side.unflatten(0, (-1, batch_size)) for side in sides)
        return z_x @ z_y.mT

    def _vectors(
        self, x: Float64[Tensor, "row observed_x"], y: Float64[Tensor, "column observed_y"], how: Critic
    ) -> tuple[Float64[Tensor, "row dim"], Float64[Tensor, "column dim"]]:
        with torch.no_grad():
            z_x = critics.prepare(how, self.g(x.float())).double()
            z_y = critics.prepare(how, self.h(y.float())).double()
        return z_x, z_y


def contrastive(temperature: float, critic: Critic, *, one_sided: float = 0.0) -> InfoNCE:
    """Return InfoNCE at a fixed temperature with the one-sided regulariser of weight lambda.

    The paper adds up both directions, and then -lambda * mean f(positives). Ours is the mean of both: half of all that.
    """
    return InfoNCE(
        critic=critic,
        init_scale=1 / temperature,
        max_scale=max(100.0, 1 / temperature),
        learn_scale=False,
        attract=one_sided / 2,
    )


def train(pairs: Pairs, plan: Plan, seed: int, check: Callable[[], None]) -> Encoders:
    """Train with Adam, its rate falling to zero along a cosine; batches are drawn with replacement.

    With the square loss y stays as it is, a locked encoder, and x is led to it.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = pairs.x.float(), pairs.y.float()
    critic: Critic = plan.loss.critic
    if isinstance(plan.loss, Square):
        g, h = _encoder(x.shape[1], y.shape[1], plan.hidden, generator), nn.Identity()
    else:
        g = _encoder(x.shape[1], plan.dimensions, plan.hidden, generator)
        h = _encoder(y.shape[1], plan.dimensions, plan.hidden, generator)
    scale = plan.loss.init_scale or 1.0 if isinstance(plan.loss, Scaled) else 1.0
    scale_ = torch.tensor(scale)
    optimiser = torch.optim.Adam([*g.parameters(), *h.parameters()], lr=plan.learning_rate, fused=True)
    for step in range(plan.steps):
        if step % CHECK_EVERY == 0:
            check()
        optimiser.param_groups[0]["lr"] = plan.learning_rate * (1 + math.cos(math.pi * step / plan.steps)) / 2
        chosen = torch.randint(len(x), (plan.batch_size,), generator=generator)
        z_x, z_y = critics.prepare(critic, g(x[chosen])), critics.prepare(critic, h(y[chosen]))
        loss = losses.compute(plan.loss, z_x, z_y, scale_)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return Encoders(g.requires_grad_(requires_grad=False), h, critic, scale)


def regress(pairs: Pairs, *, ridge: float = 1e-6) -> Encoders:
    """Solve the square loss exactly: g(x) = W x that minimises mean |W x - y|^2 + ridge * |W|^2; y stays as it is."""
    gram = pairs.x.T @ pairs.x / len(pairs.x)
    solved = torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype), pairs.x.T @ pairs.y / len(pairs.x)
    )
    g = nn.Linear(*solved.shape, bias=False)
    g.weight = nn.Parameter(solved.T.float().contiguous(), requires_grad=False)
    return Encoders(g, nn.Identity(), "squared_distance", 1.0)


def _encoder(observed: int, dimensions: int, hidden: int | None, generator: torch.Generator) -> nn.Module:
    if hidden is None:
        return linear(observed, dimensions, generator, bias=False)
    return nn.Sequential(
        linear(observed, hidden, generator, bias=True), nn.ReLU(), linear(hidden, dimensions, generator, bias=True)
    )


def linear(columns: int, rows: int, generator: torch.Generator, *, bias: bool) -> nn.Linear:
    """Make a layer that starts as torch's own does, drawn from a generator of ours and not from the process's."""
    layer = nn.Linear(columns, rows, bias=bias)
    bound = 1 / math.sqrt(columns)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer
