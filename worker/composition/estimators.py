"""Estimators of composition: scores across a pair of modalities, by comparing vectors or by summing over a bridge.

Pure functions of scores and vectors. The trained logit scale is part of a score: without it the sums are wrong, and
rankings by `direct` hide the mistake (Che & Eysenbach 2025, errata).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from service.contract.losses import Critic
from worker.learning import critics

LOG_SMALLEST: Final = -660.0  # of a sum in float64 whose lost terms cannot matter; exp underflows at -745
TRUSTED_SAMPLE_SIZE: Final = 10.0  # below it the numbers are biased low by nats while the order still holds
ROWS_AT_ONCE: Final = 1 << 22  # score entries in memory while sums are taken exactly


@final
@dataclass(frozen=True)
class Marginal:
    """What summing over the bridge says of every source and target.

    `log_ratio`: log p(target | source) - log p(target), nats. `standard_error` of it over the draw of the bridge.
    `effective_sample_size` (Kish), from 1 to the size of the bridge. `trusted`, per source: whether the values can be
    used and not only their order.
    """

    log_ratio: Float[Tensor, "source target"]
    standard_error: Float[Tensor, "source target"]
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


def marginal(
    f_source: Float[Tensor, "source bridge"], f_target: Float[Tensor, "bridge target"], *, normalise: bool
) -> Marginal:
    """Estimate log E_b exp(f(source, b) + f(b, target)) over bridge items b (Che & Eysenbach 2025, Lemma 1).

    Both scores include the trained scale of their pair, and row m of both is the same bridge item, drawn from p(b).
    `normalise` removes log E_b exp f of each leg, which InfoNCE leaves free: then the values estimate log-ratios, and
    columns can be compared. The answer is float64 on the scores' device.

    The standard error is sqrt(1 / ESS - 1 / M), that of the sum alone; the bias is about -se^2 / 2.
    """
    u, v = f_source.double(), f_target.double()
    num_bridge = u.shape[1]
    log_total = math.log(num_bridge)
    u_max, v_max = u.amax(1, keepdim=True), v.amax(0, keepdim=True)
    eu, ev = (u - u_max).exp(), (v - v_max).exp()
    log_sum = (eu @ ev).log()
    log_squares = (eu.square() @ ev.square()).log()
    # Where the legs peak at different items the products can underflow: those few are summed one by one.
    rows, columns = (torch.minimum(log_sum, log_squares) < LOG_SMALLEST).nonzero(as_tuple=True)
    at_once = max(1, ROWS_AT_ONCE // num_bridge)
    for i, j in zip(rows.split(at_once), columns.split(at_once), strict=True):
        terms = (u - u_max)[i] + (v - v_max)[:, j].T  # (lost, bridge)
        log_sum[i, j] = torch.logsumexp(terms, 1)
        log_squares[i, j] = torch.logsumexp(2 * terms, 1)
    log_ratio = log_sum + u_max + v_max - log_total
    if normalise:
        log_ratio = log_ratio - (torch.logsumexp(u, 1, keepdim=True) - log_total)
        log_ratio = log_ratio - (torch.logsumexp(v, 0, keepdim=True) - log_total)
    size = (2 * log_sum - log_squares).exp().clamp(1.0, float(num_bridge))
    return Marginal(
        log_ratio=log_ratio,
        standard_error=(1 / size - 1 / num_bridge).clamp(min=0).sqrt(),
        effective_sample_size=size,
        trusted=size.median(1).values >= TRUSTED_SAMPLE_SIZE,
    )
