"""Zero-shot logits of prompt ensembles: log prior + log mean over a label's prompts of exp(f(item, prompt))."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import torch
from pydantic import Field

from service.contract.word import Word
from worker.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Float64, Int64
    from torch import Tensor

FITTED_FROM: Final = 5  # prompts: below, terms beyond 1 / M still count
STEPS: Final = (1, 2, 5)


def log_evidence(
    f: Float[Tensor, "item prompt"], owners: Int64[Tensor, " prompt"], num_labels: int
) -> Float64[Tensor, "item label"]:
    """Return log mean exp of the scores over the prompts of each label; `owners` names the label of each prompt."""
    f = f.double()
    counts = torch.bincount(owners, minlength=num_labels).double()
    index = owners.expand_as(f)
    largest = f.new_full((len(f), num_labels), -math.inf).scatter_reduce(1, index, f, "amax")
    sums = f.new_zeros(len(f), num_labels).index_add(1, owners, (f - largest.gather(1, index)).exp())
    return largest + (sums / counts).log()


class Point(Word):
    """The figures with M prompts per label."""

    num_prompts: int
    cross_entropy: Estimate
    error: Estimate


class Fit(Word):
    """Least squares of a + b / M."""

    a: Annotated[Estimate, Field(description="with endless prompts")]
    b: Annotated[Estimate, Field(description="excess of a single prompt, were the law to hold down to it")]
    r_squared: Annotated[float | None, Field(description="null: the figure does not vary")]
    num_prompts: Annotated[list[int], Field(description="the M that were fitted")]


def steps_to(largest: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... up to `largest`, which is the last."""
    grid = [step * 10**power for power in range(len(str(largest))) for step in STEPS]
    return [*(num for num in grid if num < largest), largest]


def draw_order(owners: Int64[Tensor, " prompt"], num_labels: int, seed: int) -> Int64[Tensor, "label prompt"]:
    """Return the prompts of every label in random order, as many as the label with the fewest has."""
    rng = np.random.default_rng(seed)
    by_label = [rng.permutation(torch.nonzero(owners == label)[:, 0].numpy()) for label in range(num_labels)]
    fewest = min(map(len, by_label))
    return torch.from_numpy(np.stack([order[:fewest] for order in by_label]))


def by_num_prompts(
    f: Float[Tensor, "item prompt"], order: Int64[Tensor, "label prompt"], nums: Sequence[int]
) -> Float64[Tensor, "num item label"]:
    """Return log mean exp over the first M prompts of each label, for every M of `nums`."""
    sums = f.double()[:, order].logcumsumexp(2)  # (item, label, prompt)
    at = torch.tensor(nums)
    return (sums[:, :, at - 1] - at.double().log()).permute(2, 0, 1)


def combine(by_item: Float64[Tensor, "num item"], by_draw: Float64[Tensor, "draw num"]) -> list[Estimate]:
    """Return the means over items and draws; the error holds what both leave open, in quadrature.

    `by_item` is the mean over the draws of prompts, `by_draw` over the items.
    """
    num_items, num_draws = by_item.shape[1], len(by_draw)
    variance = by_item.var(1) / num_items + by_draw.var(0) / num_draws
    return [
        Estimate(value=value, standard_error=error)
        for value, error in zip(by_item.mean(1).tolist(), variance.sqrt().tolist(), strict=True)
    ]


def fit(nums: Sequence[int], by_item: Float64[Tensor, "num item"], by_draw: Float64[Tensor, "draw num"]) -> Fit | None:
    """Fit a + b / M by least squares; None with fewer than three M.

    The fit is linear in the figures, so each item and each draw has an a and b of its own, and their spread is the
    error. Fits from M = 5 on if at least three M are left.
    """
    kept = [at for at, num in enumerate(nums) if num >= FITTED_FROM]
    if len(kept) < 3:
        kept = list(range(len(nums)))
    if len(kept) < 3:
        return None
    chosen = [nums[at] for at in kept]
    design = torch.tensor([[1.0, 1 / num] for num in chosen], dtype=torch.float64)
    solve = torch.linalg.pinv(design)  # (2, num)
    a, b = combine(solve @ by_item[kept], by_draw[:, kept] @ solve.T)
    found = by_item[kept].mean(1)
    residual = found - design @ (solve @ found)
    spread = float((found - found.mean()).square().sum())
    r_squared = 1 - float(residual.square().sum()) / spread if spread > 0 else None
    return Fit(a=a, b=b, r_squared=r_squared, num_prompts=chosen)
