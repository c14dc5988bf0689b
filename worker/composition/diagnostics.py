"""Diagnostics of composition: figures that tell whether an estimator's assumptions hold."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def resultant(z: Float[Tensor, "item dim"]) -> float:
    """Return the length of the mean unit vector: 0 for vectors spread evenly, 1 for all alike.

    Comparing vectors directly assumes a bridge spread evenly over the sphere (Che & Eysenbach 2025, assumption A3).
    """
    return float(z.double().mean(0).norm())


def ranks(values: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
    """Rank the entries of each row from 0, ties sharing the mean of their ranks."""
    ordered = values.sort(dim=1).values.contiguous()
    first = torch.searchsorted(ordered, values.contiguous(), side="left")
    last = torch.searchsorted(ordered, values.contiguous(), side="right") - 1
    return (first + last).double() / 2


def spearman(a: Float[Tensor, "row entry"], b: Float[Tensor, "row entry"]) -> Float[Tensor, " row"]:
    """Compute the rank correlation of each row of `a` with that of `b`; NaN where a row does not vary."""
    rank_a, rank_b = ranks(a), ranks(b)
    rank_a = rank_a - rank_a.mean(1, keepdim=True)
    rank_b = rank_b - rank_b.mean(1, keepdim=True)
    return (rank_a * rank_b).sum(1) / (rank_a.norm(dim=1) * rank_b.norm(dim=1))
