"""(alpha, beta, gamma)-completeness of a score: how well it tells classes apart, and ignores everything else.

Chen et al. 2024, assumption 4.1, of a score that is at most 1 in size. Pairs of different classes lie gamma apart but
for a share alpha: both s(x', y) and s(x, y') are at most s(x, y) - gamma for partners (x, y), (x', y'). And within a
class the score hardly varies: E Var s(x, y), over the x of y's class, is at most beta; and so with x and y exchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import torch
from pydantic import Field

from service.contract.word import Word
from worker.evaluation import estimates
from worker.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Float64, Int64
    from torch import Tensor

MAX_SAMPLES: Final = 1024
ALPHAS: Final = (0.0, 0.01, 0.05, 0.1)
NUM_RESAMPLES: Final = 100
POINTS: Final = 41


class Completeness(Word):
    """The least alpha, beta and the largest gamma that the samples allow."""

    num_samples: int
    num_classes: int
    of_bound: Annotated[float, Field(description="the score was divided by this, so that it is at most 1 in size")]
    alpha: Annotated[Estimate, Field(description="share of the pairs of different classes without any margin")]
    beta: Annotated[Estimate | None, Field(description="null: no class has two samples")]
    gammas: Annotated[
        dict[str, Estimate], Field(description="by alpha: the margin that all but a share alpha of the pairs keep")
    ]
    alpha_by_gamma: Annotated[list[tuple[float, float]], Field(description="(gamma, share below it)")]


def measure(
    scores: Float[Tensor, "item item"],
    classes: Int64[Tensor, " item"],
    bound: float,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> Completeness:
    """Estimate all three from the scores of partners (the diagonal) and of all others, of two classes or more.

    Intervals weigh the items anew, as often as each is drawn again: a pair of items weighs the product. The least gamma
    of all, at alpha 0, has no interval: drawing again says nothing of a minimum. `check` may raise to stop the work.
    """
    scores = scores.double() / bound
    weights = _weights(classes, seed)
    apart = classes[:, None] != classes
    # s(x_i, y_i) less the larger of s(x_i, y_j) and s(x_j, y_i)
    gaps = scores.diagonal()[:, None] - torch.maximum(scores, scores.T)
    lost = (gaps <= 0) & apart
    alphas = _weighted(weights, lost) / _weighted(weights, apart)
    first, second = torch.nonzero(apart, as_tuple=True)
    ordered, order = gaps[first, second].sort()
    first, second = first[order], second[order]
    by_level: list[list[float]] = []
    for weight in weights:
        check()
        mass = (weight[first] * weight[second]).cumsum(0)
        at = torch.searchsorted(mass, mass[-1] * torch.tensor(ALPHAS, dtype=mass.dtype), right=True)
        by_level.append(ordered[at].tolist())
    levels = ordered[[int(level * len(ordered)) for level in ALPHAS]].tolist()
    grid = torch.linspace(float(ordered[0]), float(ordered[-1]), POINTS, dtype=torch.float64)
    return Completeness(
        num_samples=len(scores),
        num_classes=len(classes.unique()),
        of_bound=bound,
        alpha=Estimate(value=float(lost.sum() / apart.sum()), interval=estimates.interval(alphas.tolist())),
        beta=within(scores, classes, weights),
        gammas={
            str(level): Estimate(value=value, interval=estimates.interval(others) if level else None)
            for level, value, others in zip(ALPHAS, levels, np.array(by_level).T.tolist(), strict=True)
        },
        alpha_by_gamma=list(
            zip(grid.tolist(), (torch.searchsorted(ordered, grid).double() / len(ordered)).tolist(), strict=True)
        ),
    )


def within(
    scores: Float64[Tensor, "item item"],
    classes: Int64[Tensor, " item"],
    weights: Float64[Tensor, "resample item"],
) -> Estimate | None:
    """Return the mean variance of s(x, y) over the x of y's class, or over the y of x's, whichever is larger.

    None if no class has two items. Variances are unbiased; `weights` are those of the interval.
    """
    same = classes[:, None] == classes
    counts = same.sum(0)
    kept = counts > 1
    if not kept.any():
        return None
    values: list[Estimate] = []
    for each in (scores, scores.T):
        centred = (each - (each * same).sum(0) / counts) * same
        variance = centred.square().sum(0) / (counts - 1)
        again = _again(weights, same.double(), centred) * counts / (counts - 1)
        weight = weights * kept
        found = (again.nan_to_num(0) * weight).sum(1) / weight.sum(1).clamp(min=1)
        values.append(Estimate(value=float(variance[kept].mean()), interval=estimates.interval(found.tolist())))
    return max(values, key=lambda estimate: estimate.value)


def _again(
    weights: Float64[Tensor, "resample item"], same: Float64[Tensor, "item item"], centred: Float64[Tensor, "item item"]
) -> Float64[Tensor, "resample item"]:
    """Return each column's variance in each resample. An item meets its own partner once, however often it is drawn."""
    repeats = weights - 1
    mass = (weights @ same - repeats).clamp(min=1)
    mean = (weights @ centred - repeats * centred.diagonal()) / mass
    square = (weights @ centred.square() - repeats * centred.diagonal().square()) / mass
    return (square - mean.square()).clamp(min=0)


def _weights(classes: Int64[Tensor, " item"], seed: int) -> Float64[Tensor, "resample item"]:
    """Draw how often each item is drawn again; draws of one class alone have no pair to compare, and are drawn anew."""
    rng = np.random.default_rng(seed)
    num = len(classes)
    rows: list[Tensor] = []
    while len(rows) < NUM_RESAMPLES:
        row = torch.from_numpy(rng.multinomial(num, np.full(num, 1 / num)))
        if len(classes[row > 0].unique()) > 1:
            rows.append(row.double())
    return torch.stack(rows)


def _weighted(
    weights: Float64[Tensor, "resample item"], pairs: Bool[Tensor, "item item"]
) -> Float64[Tensor, " resample"]:
    return ((weights @ pairs.double()) * weights).sum(1)
