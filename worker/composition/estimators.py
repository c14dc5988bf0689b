"""Estimators of composition: scores across a pair of modalities, by comparing vectors or by summing over a bridge.

Pure functions of scores and vectors. The trained logit scale is part of a score: without it the sums are wrong, and
rankings by `direct` hide the mistake (Che & Eysenbach 2025, errata). `marginal` holds every source against every target
and says how sure each number is; `streaming` sums over as many as one likes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from service.contract.losses import Critic
from worker.learning import critics

TRUSTED_SAMPLE_SIZE: Final = 10.0  # below it the numbers are biased low by nats while the order still holds
ROWS_AT_ONCE: Final = 1 << 22  # score entries in memory while sums are taken one by one
ROUNDING: Final = 16.0  # nats: what underflow loses is e^-16 of a sum, 1e-7, at most


@final
@dataclass(frozen=True)
class Marginal:
    """What summing over the bridge says of every source and target.

    `log_ratio`: log p(target | source) - log p(target), nats. `standard_error` of it over the draw of the bridge, and
    `bias`, its expected excess over the truth. `effective_sample_size` (Kish), from 1 to the size of the bridge.
    `trusted`, per source: whether the values can be used and not only their order.
    """

    log_ratio: Float[Tensor, "source target"]
    standard_error: Float[Tensor, "source target"]
    bias: Float[Tensor, "source target"]
    effective_sample_size: Float[Tensor, "source target"]
    trusted: Bool[Tensor, " source"]


def direct(
    critic: Critic, z_source: Float[Tensor, "source dim"], z_target: Float[Tensor, "target dim"]
) -> Float[Tensor, "source target"]:
    """Compare vectors of one shared space as its trained pairs were compared; no scale is known for an untrained one.

    That ranks as summing over the bridge would where the bridge is spread evenly over the sphere (cosine) or is normal
    and round (squared distance), but not for inner products of vectors of different lengths (Che & Eysenbach 2025, A3).
    """
    return critics.scores(critic, z_source, z_target)


def as_log_shares(
    num_bridge: int, weights: Float[Tensor, " bridge"] | None, *, device: torch.device | None = None
) -> Float[Tensor, " bridge"]:
    """Return the logs of the bridge items' shares of p(b), float64: alike, or by importance weight.

    A weight is p(b) / q(b) for an item that was drawn from q; a common factor of all does not matter. Raises ValueError
    for weights that are negative, not finite, or all zero.
    """
    if weights is None:
        return torch.zeros(num_bridge, dtype=torch.float64, device=device).log_softmax(0)
    wide = weights.double().to(device)
    if len(wide) != num_bridge:
        raise ValueError(f"{len(wide)} weights for {num_bridge} bridge items")
    if not bool(torch.isfinite(wide).all()) or bool((wide < 0).any()) or not bool((wide > 0).any()):
        raise ValueError("weights are finite and not negative, and one at least is above zero")
    return wide.log().log_softmax(0)


def marginal(
    f_source: Float[Tensor, "source bridge"],
    f_target: Float[Tensor, "bridge target"],
    *,
    normalise: bool,
    weights: Float[Tensor, " bridge"] | None = None,
    precise: bool = True,
) -> Marginal:
    """Estimate log E_b exp(f(source, b) + f(b, target)) over bridge items b (Che & Eysenbach 2025, Lemma 1).

    Both scores include the trained scale of their pair, and row m of both is the same bridge item, drawn from p(b), or
    from another distribution if `weights` say how much more often p(b) would have drawn it (`as_log_shares`). The
    weights are taken relative to their sum: they are hardly ever known but for a factor, which would stay in the
    answer otherwise. `normalise` removes log E_b exp f of each leg, which InfoNCE leaves free: then the values estimate
    log-ratios, and columns can be compared. The answer is float64 on the scores' device, from sums in float64, or in
    float32 (1e-6 of a sum) unless `precise`.

    The standard error is that of the number returned: without weights and offsets sqrt(1 / ESS - 1 / M), otherwise the
    same first-order expansion of the sum divided by the sums that normalise it, which are over the same draw. The bias
    is of the second order, -1/2 var of each logarithm that is added and +1/2 var of each that is subtracted.
    """
    log_share = as_log_shares(f_source.shape[1], weights, device=f_source.device)
    return weigh(f_source.double() + log_share, f_target, log_share, normalise=normalise, precise=precise)


def weigh(
    log_mass: Float[Tensor, "source bridge"],
    f_target: Float[Tensor, "bridge target"],
    log_share: Float[Tensor, " bridge"],
    *,
    normalise: bool,
    precise: bool = True,
) -> Marginal:
    """Do as `marginal` does, from what the source's side puts on every bridge item: log(share * e^f), float64."""
    is_absent = log_share == -math.inf
    log_column = f_target.masked_fill(is_absent[:, None], -math.inf) if bool(is_absent.any()) else f_target
    found: _Sums | None = None
    if not precise:
        found = _by_products(log_mass, *_exponentials(log_column.float()), log_share, normalise=normalise)
    if found is None or bool(found.is_lost.any()):
        found = _by_products(log_mass, *_exponentials(log_column.double()), log_share, normalise=normalise)
    rows, columns = found.is_lost.nonzero(as_tuple=True)
    at_once = max(1, ROWS_AT_ONCE // len(log_share))
    for i, j in zip(rows.split(at_once), columns.split(at_once), strict=True):
        _sum_one_by_one(found, (i, j), log_mass, log_column, log_share, normalise=normalise)
    return _finished(found, log_mass, log_share, normalise=normalise)


def weigh_exponentials(
    log_mass: Float[Tensor, "source bridge"],
    place: Int64[Tensor, " bridge"],
    mass: Float[Tensor, "place target"],
    peak: Float[Tensor, " target"],
    log_share: Float[Tensor, " bridge"],
    *,
    normalise: bool,
) -> Marginal | None:
    """Do as `weigh` does, from e^(f_target - peak) in float32; None if float32 cannot hold a sum.

    Bridge items of one place have the same scores with all targets, and are there once.
    """
    found = _by_products(log_mass, mass, peak, log_share, normalise=normalise, place=place)
    return None if bool(found.is_lost.any()) else _finished(found, log_mass, log_share, normalise=normalise)


def _finished(
    found: _Sums, log_mass: Float[Tensor, "source bridge"], log_share: Float[Tensor, " bridge"], *, normalise: bool
) -> Marginal:
    log_ratio, bias = found.log_sum, (_concentration(log_share) - found.square) / 2
    if normalise:
        log_ratio = log_ratio - log_mass.logsumexp(1, keepdim=True) - found.log_offset
        bias = (_concentration(log_mass)[:, None] + found.offset_square - found.square - _concentration(log_share)) / 2
    size = (1 / found.square).clamp(1.0, float(len(log_share)))
    return Marginal(
        log_ratio=log_ratio,
        standard_error=found.variance.clamp(min=0).sqrt(),
        bias=bias,
        effective_sample_size=size,
        trusted=size.median(1).values >= TRUSTED_SAMPLE_SIZE,
    )


@final
@dataclass(frozen=True)
class _Sums:
    """Of terms t = share * e^(f + g), per source and target: what underflowed is told by `is_lost`."""

    log_sum: Float[Tensor, "source target"]
    square: Float[Tensor, "source target"]  # sum of (t / sum of t)^2: 1 / ESS
    variance: Float[Tensor, "source target"]  # of the logarithm that is returned, to first order
    log_offset: Float[Tensor, " target"]  # log E_b e^g
    offset_square: Float[Tensor, " target"]
    is_lost: Bool[Tensor, "source target"]


def gather(
    mass: Float[Tensor, "source bridge"], place: Int64[Tensor, " bridge"], num_places: int
) -> Float[Tensor, "source place"]:
    """Add up what is put on the items of each place."""
    return mass.new_zeros(len(mass), num_places).index_add_(1, place, mass)


def _exponentials(f: Float[Tensor, "bridge target"]) -> tuple[Float[Tensor, "bridge target"], Float[Tensor, " target"]]:
    """Shift each column by its largest entry, and return that too."""
    peak = f.amax(0)
    return (f - peak).exp(), peak


def _by_products(
    log_mass: Float[Tensor, "source bridge"],
    b: Float[Tensor, "place target"],
    column_peak: Float[Tensor, " target"],
    log_share: Float[Tensor, " bridge"],
    *,
    normalise: bool,
    place: Int64[Tensor, " bridge"] | None = None,
) -> _Sums:
    """Take all sums as matrix products of exponentials, each row and column shifted by its largest entry.

    With T, U, V, W the shares of a bridge item in the whole sum, in that of either leg, and in p(b), the logarithm of
    T's sum over those of U and V changes by T - U - V + W where the item is drawn once more: the variance is the sum of
    the squares, and each product below is one of the terms of that square.
    """
    num, dtype = len(log_mass), b.dtype
    mass_peak = log_mass.amax(1, keepdim=True)
    a, w = (log_mass - mass_peak).exp(), (log_share - log_share.amax()).exp()
    left = torch.cat([a, a * a, a * w, w[None], (w * w)[None]]).to(dtype)
    if place is not None:
        left = gather(left, place, len(b))
    sums, squares, shares, v, vw = (left @ b).double().split([num, num, num, 1, 1])
    square_sums, share_squares, v_square = (
        (torch.cat([left[num : 3 * num], left[-1:]]) @ b.square()).double().split([num, num, 1])
    )
    u, total = a.sum(1, keepdim=True), w.sum()
    tt, ww = square_sums / sums.square(), (w / total).square().sum()
    if normalise:
        uu, uw = (a / u).square().sum(1, keepdim=True), (a * w).sum(1, keepdim=True) / u / total
        tu, tv, tw, uv = squares / sums / u, share_squares / sums / v, shares / sums / total, shares / u / v
        variance = tt + uu + v_square / v.square() + ww + 2 * (tw + uv - tu - tv - uw - vw / v / total)
    else:
        variance = tt + ww - 2 * shares / sums / total
    smallest = torch.finfo(dtype).tiny * len(log_share) * math.exp(ROUNDING)
    lowest = torch.stack([square_sums, squares, share_squares]).amin(0).minimum(sums).minimum(v_square)
    return _Sums(
        log_sum=sums.log() + mass_peak + column_peak,
        square=tt,
        variance=variance,
        log_offset=(v.log() + column_peak)[0] + log_share.amax(),
        offset_square=(v_square / v.square())[0],
        is_lost=~(lowest >= smallest),
    )


def _sum_one_by_one(
    found: _Sums,
    at: tuple[Int64[Tensor, " lost"], Int64[Tensor, " lost"]],
    log_mass: Float[Tensor, "source bridge"],
    log_column: Float[Tensor, "bridge target"],
    log_share: Float[Tensor, " bridge"],
    *,
    normalise: bool,
) -> None:
    """Replace entries that the products cannot hold, where the legs peak at different items."""
    i, j = at
    column = log_column.T[j].double()
    terms = log_mass[i] + column
    term, target = terms.softmax(1), (log_share + column).softmax(1)
    change = term - log_share.exp()
    if normalise:
        change = term - log_mass[i].softmax(1) - target + log_share.exp()
    found.log_sum[i, j] = terms.logsumexp(1)
    found.square[i, j] = term.square().sum(1)
    found.variance[i, j] = change.square().sum(1)
    found.log_offset[j] = (log_share + column).logsumexp(1)
    found.offset_square[j] = target.square().sum(1)


def _concentration(log_weight: Float[Tensor, "*row bridge"]) -> Float[Tensor, "*row"]:
    """Sum the squares of the shares: 1 for a single item, 1 / M for M alike."""
    return log_weight.softmax(-1).square().sum(-1)
