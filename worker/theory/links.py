"""Encoders of two pairs that share a modality, with the logit scale of each pair, trained with the losses of jobs.

Every modality is a module; a pair names two of them, so that two pairs which name the same one share its space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from torch import nn

from service.contract.losses import Critic, InfoNCE
from worker.composition import streaming
from worker.learning import critics, losses
from worker.theory import encoders

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped
    from torch import Tensor

MAX_SCALE: Final = 100.0
WARM_UP: Final = 50  # steps; the rate is large


@final
@dataclass(frozen=True)
class Plan:
    """How to train: Adam, its rate falling to zero along a cosine, a batch of every pair in each step."""

    critic: Critic
    steps: int
    dimensions: int
    hidden: int = 0
    """Width of the hidden layers, where there are any."""
    batch_size: int = 256
    learning_rate: float = 1e-2


@final
@dataclass(frozen=True)
class Pairs:
    """Samples of a pair; row i of both sides belongs together."""

    names: tuple[str, str]
    x: Shaped[Tensor, "pair ..."]
    y: Shaped[Tensor, "pair ..."]


@final
@dataclass(frozen=True)
class Trained:
    """Encoders by modality, and the learned scale of each pair."""

    modules: nn.ModuleDict
    critic: Critic
    scales: dict[tuple[str, str], float]

    @torch.no_grad()
    def embed(self, name: str, x: Shaped[Tensor, "row ..."]) -> Float[Tensor, "row dim"]:
        """Encode, to vectors as the critic compares them."""
        return critics.prepare(self.critic, self.modules[name](_single(x)))

    def link(self, first: str, second: str, *, scale: float | None = None) -> streaming.Link:
        """Return the pair as a step of a composition; `scale` in place of what was learned."""
        return streaming.Link(self.critic, self.scales[first, second] if scale is None else scale)


def perceptron(observed: int, hidden: int, dimensions: int, generator: torch.Generator) -> nn.Module:
    """Return two hidden layers, the first normalised over the batch, as in the paper's published code."""
    return nn.Sequential(
        encoders.linear(observed, hidden, generator, bias=True),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        encoders.linear(hidden, hidden, generator, bias=True),
        nn.ReLU(),
        encoders.linear(hidden, dimensions, generator, bias=True),
    )


def table(values: int, dimensions: int, generator: torch.Generator) -> nn.Module:
    """Return a free vector for each value of a discrete modality."""
    module = nn.Embedding(values, dimensions)
    nn.init.normal_(module.weight, std=1 / math.sqrt(dimensions), generator=generator)
    return module


def train(
    pairs: Sequence[Pairs], modules: Mapping[str, nn.Module], plan: Plan, seed: int, check: Callable[[], None]
) -> Trained:
    """Train on the mean of the pairs' losses; batches are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    # The scale starts where a recipe that leaves it open starts it.
    start = 1 / 0.07 if plan.critic == "cosine" else plan.dimensions**-0.5
    loss = InfoNCE(critic=plan.critic, init_scale=start, max_scale=MAX_SCALE)
    every = nn.ModuleDict(modules).train()
    log_scales = nn.Parameter(torch.full((len(pairs),), math.log(start)))
    optimiser = torch.optim.Adam([*every.parameters(), log_scales], lr=plan.learning_rate, fused=True)
    sides = [(each.names, _single(each.x), _single(each.y)) for each in pairs]
    for step in range(plan.steps):
        if step % encoders.CHECK_EVERY == 0:
            check()
        share = (1 + math.cos(math.pi * step / plan.steps)) / 2
        optimiser.param_groups[0]["lr"] = plan.learning_rate * share * min(1.0, (step + 1) / WARM_UP)
        total = torch.zeros(())
        for ((first, second), x, y), log_scale in zip(sides, log_scales, strict=True):
            chosen = torch.randint(len(x), (plan.batch_size,), generator=generator)
            z_x, z_y = (
                critics.prepare(plan.critic, every[name](side[chosen])) for name, side in ((first, x), (second, y))
            )
            total = total + losses.compute(loss, z_x, z_y, log_scale.exp().clamp(max=MAX_SCALE)) / len(pairs)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    scales = log_scales.detach().exp().clamp(max=MAX_SCALE).tolist()
    return Trained(
        every.eval().requires_grad_(requires_grad=False),
        plan.critic,
        {each.names: scale for each, scale in zip(pairs, scales, strict=True)},
    )


def _single(x: Shaped[Tensor, "row ..."]) -> Shaped[Tensor, "row ..."]:
    return x.float() if x.is_floating_point() else x
