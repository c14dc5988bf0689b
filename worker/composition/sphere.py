"""Whether unit vectors lie evenly around: tests of Rayleigh, Bingham and Kolmogorov-Smirnov, and sizes of the effects.

Comparing vectors of a pair that was never trained ranks as summing over the bridge does if the bridge is uniform on the
sphere (Che & Eysenbach 2025, A3). No trained bridge is, and many items prove it: what counts is by how much.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from service.contract.diagnostics import SphereFigures
from worker.composition.choice import CONCENTRATED, SPREAD
from worker.composition.closed_forms import log_mean_exp_on_sphere

if TYPE_CHECKING:
    from service.contract.diagnostics import Verdict

MAX_ITEMS: Final = 4096
LARGEST_MATRIX: Final = 1024  # of which eigenvalues are taken in no time
DIRECTIONS: Final = 32
POINTS: Final = 1 << 14  # of an integral
COMPARED_ITEMS: Final = 2048  # each with each
POTENTIAL_T: Final = 2.0


def measure(z: Float[Tensor, "item dim"], seed: int = 0) -> SphereFigures:
    """Measure the directions of vectors, at most `MAX_ITEMS` of them; items come in no order.

    Raises ValueError for fewer than two vectors, or fewer than two dimensions.
    """
    num, dim = min(len(z), MAX_ITEMS if z.shape[1] <= LARGEST_MATRIX else LARGEST_MATRIX), z.shape[1]
    if num < 2 or dim < 2:
        raise ValueError(f"{num} vectors of {dim} dimensions do not fill a sphere")
    u = functional.normalize(z[:num].double(), dim=1)
    length, (trace_square, axis) = float(u.mean(0).norm()), _moments(u)
    rayleigh = dim * num * length**2
    bingham = dim * (dim + 2) * num / 2 * (trace_square - 1 / dim)
    distance, projection_p = projections(u, seed)
    largest_axis = dim * axis
    return SphereFigures(
        num_items=num,
        dimensions=dim,
        resultant=length,
        largest_axis=largest_axis,
        rayleigh=rayleigh,
        rayleigh_p=chi_squared_tail(rayleigh, float(dim)),
        bingham=bingham,
        bingham_p=chi_squared_tail(bingham, (dim - 1) * (dim + 2) / 2),
        projection_distance=distance,
        projection_p=projection_p,
        log_potential=log_potential(u[:COMPARED_ITEMS]),
        log_potential_if_even=log_potential_if_even(dim),
        verdict=judge(length, largest_axis, num, dim),
    )


def judge(resultant: float, largest_axis: float, num_items: int, dim: int) -> Verdict:
    """Judge the sizes of the effects: a mean direction above `CONCENTRATED` fails, one below `SPREAD` passes.

    An axis that holds twice what it would by chance, (1 + sqrt(d / n))^2 at most, is doubtful.
    """
    if resultant > CONCENTRATED:
        return "fails"
    if resultant >= SPREAD or largest_axis > 2 * (1 + math.sqrt(dim / num_items)) ** 2:
        return "doubtful"
    return "passes"


def chi_squared_tail(value: float, degrees: float) -> float:
    """Return the chance that a chi-squared variable exceeds a value."""
    half = torch.tensor([degrees / 2, max(value, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def projections(u: Float64[Tensor, "item dim"], seed: int) -> tuple[float, float]:
    """Return the largest Kolmogorov-Smirnov distance over random directions, and its chance on an even sphere.

    (1 + u.v) / 2 has the law Beta((d - 1) / 2, (d - 1) / 2) there; the chance is Bonferroni's over the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    v = functional.normalize(torch.randn(u.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64), dim=0)
    along = (u.cpu() @ v).T.sort(dim=1).values
    expected = projection_cdf(along, u.shape[1])
    num = along.shape[1]
    steps = torch.arange(num + 1, dtype=torch.float64) / num
    distance = float(torch.maximum(steps[1:] - expected, expected - steps[:-1]).amax())
    return distance, min(1.0, DIRECTIONS * kolmogorov_tail(distance, num))


def projection_cdf(t: Float64[Tensor, "*any"], dim: int) -> Float64[Tensor, "*any"]:
    """Return P(u.v <= t) for u even on the sphere: the integral of sin^(d - 2) over the angles from arccos t on."""
    angles = torch.linspace(0, math.pi, POINTS + 1, dtype=torch.float64)
    density = angles.sin().clamp(min=0).pow(dim - 2)
    mass = torch.cat([torch.zeros(1, dtype=torch.float64), ((density[1:] + density[:-1]) / 2).cumsum(0)])
    at = t.clamp(-1, 1).arccos() * (POINTS / math.pi)
    below = at.floor().long().clamp(0, POINTS - 1)
    left = mass[below] + (at - below) * (mass[below + 1] - mass[below])
    return 1 - left / mass[-1]


def kolmogorov_tail(distance: float, num: int) -> float:
    """Return the chance of a Kolmogorov-Smirnov distance as large (Stephens 1970): to .02, and .001 if it is small."""
    root = math.sqrt(num)
    x = (root + 0.12 + 0.11 / root) * distance
    if x < 0.2:
        return 1.0
    total = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, total))


def log_potential(u: Float64[Tensor, "item dim"]) -> float:
    """Return log mean exp(-2 |u_i - u_j|^2) over i != j (Wang & Isola 2020)."""
    num = len(u)
    near = (2 * POTENTIAL_T * (u @ u.T - 1)).exp_()
    return math.log(max(float(near.sum()) - float(near.diagonal().sum()), 1e-300) / (num * (num - 1)))


def log_potential_if_even(dim: int) -> float:
    """Return the same for vectors even on the sphere: E exp(-2 |u - u'|^2) = e^-4 E exp(4 u.u')."""
    kappa = torch.tensor(2 * POTENTIAL_T, dtype=torch.float64)
    return float(log_mean_exp_on_sphere(kappa, dim)) - 2 * POTENTIAL_T


def _moments(u: Float64[Tensor, "item dim"]) -> tuple[float, float]:
    """Return tr T^2 and the largest eigenvalue of T = mean u u^T, by way of the smaller of T and the Gram matrix."""
    smaller = (u.T @ u if len(u) >= u.shape[1] else u @ u.T) / len(u)
    return float(smaller.square().sum()), float(torch.linalg.eigvalsh(smaller)[-1])
