"""Whether vectors lie as a round normal distribution around 0 would, which the squared distance takes for granted.

Only then does comparing vectors of a pair that was never trained rank as summing over the bridge does (Che & Eysenbach
2025, A3 and Lemma 3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from jaxtyping import Float
from torch import Tensor

from service.contract.diagnostics import NormalFigures
from worker.composition.sphere import LARGEST_MATRIX, MAX_ITEMS

if TYPE_CHECKING:
    from service.contract.diagnostics import Verdict

LARGEST_KURTOSIS: Final = 0.5
LARGEST_ELONGATION: Final = 2.0  # times what chance makes of a round one
HOPELESS: Final = 4.0  # times these bounds


def measure(z: Float[Tensor, "item dim"]) -> NormalFigures:
    """Measure vectors, at most `MAX_ITEMS` of them; items come in no order.

    Raises ValueError for fewer than two vectors, or for vectors that are all alike.
    """
    num, dim = min(len(z), MAX_ITEMS if z.shape[1] <= LARGEST_MATRIX else LARGEST_MATRIX), z.shape[1]
    wide = z[:num].double()
    mean = wide.mean(0)
    centred = wide - mean
    variances = centred.square().mean(0)
    average = float(variances.mean())
    if num < 2 or average == 0:
        raise ValueError(f"{num} vectors that do not differ have no shape")
    varied = variances > 1e-12 * average
    kurtoses = centred[:, varied].pow(4).mean(0) / variances[varied].square() - 3
    smaller = (centred.T @ centred if num >= dim else centred @ centred.T) / num
    elongation = float(torch.linalg.eigvalsh(smaller)[-1]) / average
    excess = float(kurtoses.mean())
    return NormalFigures(
        num_items=num,
        dimensions=dim,
        axis_mean=float(mean.abs().amax()) / math.sqrt(average),
        axis_variance=(float(variances.amin()), float(variances.amax())),
        axis_kurtosis=(float(kurtoses.amin()), float(kurtoses.amax())),
        excess_kurtosis=excess,
        elongation=elongation,
        verdict=judge(excess, elongation, num, dim),
    )


def judge(excess_kurtosis: float, elongation: float, num_items: int, dim: int) -> Verdict:
    """Judge by the larger of both figures in units of its bound: up to 1 passes, up to `HOPELESS` is doubtful."""
    by_chance = (1 + math.sqrt(dim / num_items)) ** 2
    worst = max(abs(excess_kurtosis) / LARGEST_KURTOSIS, elongation / (LARGEST_ELONGATION * by_chance))
    return "passes" if worst <= 1 else "doubtful" if worst <= HOPELESS else "fails"
