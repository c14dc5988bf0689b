"""`torch.compile` for the blocks of towers, where it pays or is asked for.

Blocks alone: they are nearly all of the work, every block of a shape shares one piece of code, and what decides on
shapes (padding, masks) stays plain Python. Where nothing can be compiled, a run goes on without and says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from service.contract.recipe import Budget, Compute
from worker.learning.towers.transformer import Transformer

if TYPE_CHECKING:
    from service.contract.recipe import Recipe
    from worker.learning.model import MultiTower
    from worker.runner import Context

LONG_RUN_STEPS: Final = 2000
"""From here on `auto` compiles, on CUDA: half a minute or so is spent first."""
MAX_VARIANTS: Final = 64
"""Of one block's code: tower by tower, with and without a mask, with and without a gradient."""


def compile_towers(model: MultiTower, recipe: Recipe, device: torch.device, ctx: Context) -> None:
    """Compile the blocks of all towers in place if the recipe's `compute.compile` says so and the machine can.

    An event says what became of it, unless nothing was to be compiled. Names of weights stay as they are.
    """
    wanted = (recipe.compute or Compute()).compile
    num_steps = (recipe.budget or Budget()).steps
    if wanted == "never" or (wanted == "auto" and (device.type != "cuda" or num_steps < LONG_RUN_STEPS)):
        return
    try:
        torch.compile(_probe)(torch.ones(16, device=device))
    except (RuntimeError, OSError) as error:  # no compiler, no headers, a device too old: torch has a class for each
        cause = getattr(error, "inner_exception", error)  # behind "the backend raised"
        ctx.event("not_compiled", {"reason": f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"})
        return
    config = torch._dynamo.config  # noqa: SLF001 - torch documents its settings under this name
    config.recompile_limit = max(config.recompile_limit, MAX_VARIANTS)
    config.suppress_errors = True  # a block that does not compile after all runs as it is
    ours = {name: tower for name, tower in sorted(model.towers.items()) if isinstance(tower, Transformer)}
    for tower in ours.values():
        for block in tower.blocks:
            block.compile(dynamic=True)
    ctx.event("compiled", {"towers": list(ours)})


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * x.sin() + 1
