"""Closed forms of the sum over the bridge, where the bridge has a shape that gives one: no draw, so no error of it.

Che & Eysenbach (2025), Lemma 2 (vectors even on the sphere) and Lemma 3 (normal vectors), here for legs of different
scales, and for normal bridges off the origin and of different widths along different axes. They know nothing of how the
bridge really lies: `diagnostics` tell whether they may be used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor

LARGE: Final = 100.0  # above it five terms of the asymptotic series are exact to 1e-10; below it the power series is


@final
@dataclass(frozen=True)
class Normal:
    """A normal distribution by its axes: columns of `axes` are orthonormal, `variances` lie along them."""

    mean: Float[Tensor, " dim"]
    axes: Float[Tensor, "dim dim"]
    variances: Float[Tensor, " dim"]


def fit_normal(z: Float[Tensor, "item dim"], log_shares: Float[Tensor, " item"] | None = None) -> Normal:
    """Fit a normal distribution to bridge vectors by their moments, float64."""
    wide = z.double()
    shares = torch.full_like(wide[:, 0], 1 / len(wide)) if log_shares is None else log_shares.double().exp()
    mean = shares @ wide
    centred = wide - mean
    variances, axes = torch.linalg.eigh((centred * shares[:, None]).T @ centred)
    return Normal(mean, axes, variances.clamp(min=0))


def log_mean_exp_on_sphere(kappa: Float[Tensor, "*any"], dim: int) -> Float[Tensor, "*any"]:
    """Return log E exp(kappa <b, e>) for b even on the unit sphere of `dim` dimensions and a unit vector e, float64.

    That is log Gamma(d/2) (2/kappa)^(d/2-1) I_(d/2-1)(kappa) (Lemma 2). With x = kappa^2 / 4 and n = d/2 - 1 it is the
    log of sum_k x^k / (k! (n+1)...(n+k)), all terms positive; for large kappa the expansion of I_n that is uniform in n
    (Abramowitz & Stegun 9.7.7, 9.3.9), in which the powers of kappa cancel.
    """
    wide = kappa.double().abs()
    return torch.where(wide > LARGE, _asymptotic(wide, dim / 2 - 1), _series(wide.clamp(max=LARGE), dim / 2 - 1))


def _series(kappa: Float[Tensor, "*any"], order: float) -> Float[Tensor, "*any"]:
    x = kappa.square() / 4
    term, total = torch.ones_like(x), torch.zeros_like(x)
    for k in range(1, 1000):  # 120 terms at most
        term = term * (x / (k * (order + k)))
        total = total + term
        if bool((term <= 1e-17 * total).all()):
            break
    return total.log1p()


def _asymptotic(kappa: Float[Tensor, "*any"], order: float) -> Float[Tensor, "*any"]:
    h = torch.hypot(kappa, torch.full_like(kappa, order))
    p = (order / h).square()
    correction = (
        (3 - 5 * p) / (24 * h)
        + (81 - p * (462 - p * 385)) / (1152 * h**2)
        + (30375 - p * (369603 - p * (765765 - p * 425425))) / (414720 * h**3)
        + (4465125 - p * (94121676 - p * (349922430 - p * (446185740 - p * 185910725)))) / (39813120 * h**4)
    )
    constant = math.lgamma(order + 1) + order * math.log(2) - math.log(2 * math.pi) / 2
    return constant + h - order * (order + h).log() - h.log() / 2 + correction.log1p()


def sphere(
    z_source: Float[Tensor, "source dim"],
    z_target: Float[Tensor, "target dim"],
    scales: tuple[float, float],
    *,
    normalise: bool,
) -> Float[Tensor, "source target"]:
    """Return log E_b exp(s1 <a, b> + s2 <b, c>) for b even on the sphere, float64; all vectors are unit vectors.

    Lemma 2 with kappa = |s1 a + s2 c|, which for s1 = s2 is s sqrt(2 + 2 <a, c>). `normalise` removes log E_b exp f of
    each leg, here the same for all vectors.
    """
    first, second = scales
    dim = z_source.shape[1]
    cosines = (z_source.double() @ z_target.double().T).clamp(-1, 1)
    kappa = (first**2 + second**2 + 2 * first * second * cosines).clamp(min=0).sqrt()
    found = log_mean_exp_on_sphere(kappa, dim)
    return found - log_mean_exp_on_sphere(kappa.new_tensor(scales), dim).sum() if normalise else found


def gaussian(
    z_source: Float[Tensor, "source dim"],
    z_target: Float[Tensor, "target dim"],
    scales: tuple[float, float],
    bridge: Normal,
    *,
    normalise: bool,
) -> Float[Tensor, "source target"]:
    """Return log E_b exp(-s1/2 |a - b|^2 - s2/2 |b - c|^2) for normal b, float64.

    The exponent is -s/2 |b - w|^2 - s1 s2 / (2 s) |a - c|^2 with s = s1 + s2 and w = (s1 a + s2 c) / s, and
    E exp(-s/2 |b - w|^2) = prod_i (1 + s v_i)^(-1/2) exp(-s / (2 (1 + s v_i)) (w - mean)_i^2) along the axes i: Lemma 3
    for mean 0, all v_i alike and both scales 1. `normalise` removes log E_b exp f of each leg.
    """
    first, second = scales
    both = first + second
    a, c = ((z.double() - bridge.mean) @ bridge.axes for z in (z_source, z_target))
    within = (first * a / both, second * c / both)  # w - mean is the sum of one of each
    pull = both / (1 + both * bridge.variances)
    apart = _squared_distances(a, c) * (first * second / both)
    reach = _squared_distances(within[0] * pull.sqrt(), -within[1] * pull.sqrt())
    found = -(apart + reach + (both * bridge.variances).log1p().sum()) / 2
    if normalise:
        found = found - _log_offset(a, first, bridge)[:, None] - _log_offset(c, second, bridge)
    return found


def _log_offset(z: Float[Tensor, "row dim"], scale: float, bridge: Normal) -> Float[Tensor, " row"]:
    wide = scale * bridge.variances
    return -(z.square() @ (scale / (1 + wide)) + wide.log1p().sum()) / 2


def _squared_distances(a: Float[Tensor, "row dim"], b: Float[Tensor, "column dim"]) -> Float[Tensor, "row column"]:
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * (a @ b.T)
    return squares.clamp(min=0)
