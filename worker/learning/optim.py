"""The optimiser and its schedule. The learning rate is a pure function of the step, so it needs no state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from service.contract.recipe import Optimiser


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay applies: to matrices, not to biases, norms, scales or positions."""
    return parameter.ndim >= 2 and not name.endswith("positions")


def build(config: Optimiser, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter 2019) over the named parameters that learn."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (decayed if decays(name, parameter) else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(config: Optimiser, step: int, num_steps: int) -> float:
    """Return the rate of step 0, 1, ...: linear warm-up, then half a cosine down to the final fraction."""
    warmup = min(config.warmup_steps, num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * cosine)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Use a rate for the next step, in all groups."""
    for group in optimiser.param_groups:
        group["lr"] = rate
