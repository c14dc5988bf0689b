"""Where the vectors of two modalities lie: near their partners, spread out, and apart from each other or not.

All of it is about directions, on the unit sphere: vectors of other length are normalised first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final

import torch
from pydantic import Field

from service.contract.word import Word
from worker.evaluation import estimates, probe
from worker.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

UNIFORMITY_T: Final = 2.0
ROWS_AT_ONCE: Final = 1024
SEPARATED_SAMPLES: Final = 2000


class Geometry(Word):
    """Alignment, uniformity and gap of one pair of modalities."""

    num_samples: int
    alignment: Annotated[Estimate, Field(description="mean |z_a - z_b|^2 of partners; 0 best, 2 for unrelated ones")]
    uniformity: Annotated[dict[str, Estimate], Field(description="by modality; 0: one point, lower: more even")]
    gap: Annotated[Estimate, Field(description="|mean z_a - mean z_b|")]
    gap_by_chance: Annotated[float, Field(description="what the gap of one and the same distribution would come to")]
    separable: Annotated[
        Estimate | None,
        Field(description="share of unseen vectors whose modality a linear classifier tells; .5: it cannot"),
    ]


def alignment(z_a: Float[Tensor, "item dim"], z_b: Float[Tensor, "item dim"]) -> Estimate:
    """Return the mean squared distance of partners (Wang & Isola 2020, alpha = 2)."""
    return estimates.mean((z_a - z_b).double().square().sum(1))


def uniformity(z: Float[Tensor, "item dim"], check: Callable[[], None] = lambda: None) -> Estimate:
    """Return log mean exp(-2 |z_i - z_j|^2) over i != j (Wang & Isola 2020, t = 2).

    Its error is that of a U-statistic: twice the deviation of each item's own mean, over sqrt(n). Built by blocks of
    rows.
    """
    num = len(z)
    own = torch.empty(num, dtype=torch.float64)
    for start in range(0, num, ROWS_AT_ONCE):
        check()
        rows = slice(start, start + ROWS_AT_ONCE)
        squared = (2 - 2 * (z[rows] @ z.T).double()).clamp(min=0)
        near = (-UNIFORMITY_T * squared).exp()
        at = torch.arange(len(near))
        near[at, start + at] = 0
        own[rows] = near.sum(1) / (num - 1)
    mean = float(own.mean())
    error = 2 * float(own.std()) / math.sqrt(num) / mean
    return Estimate(value=math.log(mean), standard_error=error)


def gap(z_a: Float[Tensor, "item dim"], z_b: Float[Tensor, "item dim"]) -> tuple[Estimate, float]:
    """Return the distance of the two means (Liang et al. 2022), and what it comes to where there is none.

    The latter is sqrt(E |noise|^2): of two means of as many items, that differ by chance alone.
    """
    difference = (z_a - z_b).double()
    mean = difference.mean(0)
    length = float(mean.norm())
    num = len(difference)
    error = float((difference @ mean).std()) / length / math.sqrt(num) if length > 0 else 0.0
    return Estimate(value=length, standard_error=error), math.sqrt(float(difference.var(0).sum()) / num)


def separable(z_a: Float[Tensor, "item dim"], z_b: Float[Tensor, "item dim"]) -> Estimate | None:
    """Return how often a logistic regression of half the items tells the modality of the others; None below 20 items.

    Partners are on the same side.
    """
    z_a, z_b = z_a[:SEPARATED_SAMPLES], z_b[:SEPARATED_SAMPLES]
    half = len(z_a) // 2
    if half < 10:
        return None
    truth = torch.arange(2).repeat_interleave(half)
    classifier = probe.fit(torch.cat([z_a[:half], z_b[:half]]), truth, inverse_penalty=1.0)
    unseen = torch.cat([z_a[half : 2 * half], z_b[half : 2 * half]])
    return estimates.mean((classifier.log_p(unseen).argmax(1) == truth).double())
