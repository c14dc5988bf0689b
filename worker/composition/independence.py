"""Whether source and target are independent given the bridge (Che & Eysenbach 2025, A1): needs all three together.

Pairs alone cannot tell: two laws of triples with the same pairs differ in nothing else. From triples, what the bridge
explains is taken off the vectors of both ends, and what is left of one is held against what is left of the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

if TYPE_CHECKING:
    from service.contract.diagnostics import Verdict

FEWEST: Final = 64  # triples
MAX_TRIPLES: Final = 1024
PENALTIES: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
ITEMS_PER_AXIS: Final = 30  # of the fitting half
SMALL: Final = 0.05  # nats
LARGE: Final = 0.5
LARGEST_CORRELATION: Final = 0.9999


@final
@dataclass(frozen=True)
class Dependence:
    """Nats that are seen of I(source; target | bridge) on triples that nothing was fitted to: a value per triple.

    `correlations`: the canonical ones of what the bridge leaves, above what chance makes.
    """

    nats: Float64[Tensor, " triple"]
    correlations: Float64[Tensor, " axis"]


def measure(
    z_source: Float[Tensor, "triple d1"], z_bridge: Float[Tensor, "triple d2"], z_target: Float[Tensor, "triple d3"]
) -> Dependence:
    """Measure what joins source and target beside the bridge, by a normal model of what a regression leaves of both.

    Its mean is in expectation not above I(source; target | bridge) of the vectors but for what the regression misses: 0
    where it finds nothing, and possibly below where it finds what is not there. Rows are triples in no order, of which
    `MAX_TRIPLES` are taken. Raises ValueError for fewer than `FEWEST`.
    """
    num = min(len(z_bridge), MAX_TRIPLES)
    if num < FEWEST:
        raise ValueError(f"{num} triples are too few to tell: at least {FEWEST}")
    values, axes = torch.linalg.eigh(_kernel(z_bridge[:num].double()))
    left = [_left_over(values, axes, z[:num].double()) for z in (z_source, z_target)]
    half = num // 2
    u, v = (_whitened(each, half) for each in left)
    rotate_u, found, rotate_v = torch.linalg.svd(u[:half].T @ v[:half] / half, full_matrices=False)
    found = found[found > largest_by_chance(u.shape[1], v.shape[1], half)].clamp(max=LARGEST_CORRELATION)
    u, v = u[half:] @ rotate_u[:, : len(found)], v[half:] @ rotate_v.T[:, : len(found)]
    squares = found.square()
    nats = -(-squares).log1p().sum() / 2 - (
        (squares * (u.square() + v.square()) - 2 * found * u * v) / (2 * (1 - squares))
    ).sum(1)
    return Dependence(nats, found)


def judge(nats: float, standard_error: float) -> Verdict:
    """Judge I(source; target | bridge): what is small, or twice its error at most, passes."""
    if nats <= max(SMALL, 2 * standard_error):
        return "passes"
    return "doubtful" if nats <= LARGE else "fails"


def largest_by_chance(dim_a: int, dim_b: int, num: int) -> float:
    """Return the largest canonical correlation of independent normal vectors, for many items (Wachter 1980)."""
    p, q = min(1.0, dim_a / num), min(1.0, dim_b / num)
    edge = math.sqrt(p * (1 - q)) + math.sqrt(q * (1 - p))
    # Beside the edge: its fluctuations, of the order n^(-2/3).
    return min(1.0, edge + 2 * num ** (-2 / 3))


def _kernel(z: Float64[Tensor, "item dim"]) -> Float64[Tensor, "item item"]:
    """Return what a regression on the bridge may be made of: a constant, the vectors, and bumps of median width."""
    centred = z - z.mean(0)
    linear = centred @ centred.T
    squared = (linear.diagonal()[:, None] + linear.diagonal() - 2 * linear).clamp(min=0)
    width = squared.median().clamp(min=1e-12)
    return 1 + linear / linear.diagonal().mean().clamp(min=1e-12) + (-squared / width).exp()


def _left_over(
    values: Float64[Tensor, " item"], axes: Float64[Tensor, "item item"], z: Float64[Tensor, "item dim"]
) -> Float64[Tensor, "item dim"]:
    """Return what is left of each vector by a ridge regression on all other items; K = axes diag(values) axes^T.

    Leaving item i out gives (G z)_i / G_ii with G = (K + penalty)^-1; the penalty is the one that leaves least.
    """
    along = axes.T @ (z - z.mean(0))
    best, least = z, math.inf
    for penalty in PENALTIES:
        inverse = 1 / (values.clamp(min=0) + penalty)
        found = (axes * inverse) @ along / (axes.square() @ inverse)[:, None]
        size = float(found.square().sum())
        if size < least:
            best, least = found, size
    return best


def _whitened(left: Float64[Tensor, "item dim"], half: int) -> Float64[Tensor, "item axis"]:
    """Bring what is left to unit covariance along its main axes, as the first half of the items has them."""
    left = left - left[:half].mean(0)
    _, lengths, axes = torch.linalg.svd(left[:half], full_matrices=False)
    kept = lengths > 1e-6 * lengths[0].clamp(min=1e-300)
    kept[max(1, half // ITEMS_PER_AXIS) :] = False
    return left @ (axes[kept].T * (math.sqrt(half) / lengths[kept]))
