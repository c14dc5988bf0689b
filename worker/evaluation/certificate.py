"""A bound on the zero-shot error that every sample pays for itself, so that no run can violate it.

If the true label is not among the r largest of the logits L, at least r others are as large, so
log sum_k exp(L_k - L_true) >= log(1 + r). Its mean over the samples, over log(1 + r), is therefore at least the top-r
error (Chen et al. 2024, corollary 5.1 and its proof). With logits that hold the log prior, that mean is the
cross-entropy: a low loss certifies a low error, a high one says nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from service.contract.word import Word
from worker.evaluation import estimates
from worker.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int64
    from torch import Tensor

ROUNDED_UP: Final = 1 + 1e-9  # a bound may not lose to the rounding of its own logarithms
LARGEST: Final = 1e140  # nats; whatever is above is written as this, so that sums of squares stay finite


class Certificate(Word):
    """A bound and what it bounds."""

    r: int
    bound: Annotated[Estimate, Field(description="mean log sum exp over log(1 + r); may be above 1")]
    shown: Annotated[float, Field(description="the bound, or 1 if it is above: it says nothing then")]
    error: Annotated[Estimate, Field(description="the measured top-r error, never above the bound")]


def log_sum_exp(logits: Float[Tensor, "item label"], truth: Int64[Tensor, " item"]) -> Float[Tensor, " item"]:
    """Return log sum_k exp(L_k - L_true) of every item, in float64, at most `LARGEST`."""
    chosen = logits.double().log_softmax(1).gather(1, truth[:, None]).squeeze(1)
    return (-chosen).clamp(0, LARGEST)


def certify(cost: Float[Tensor, " item"], misses: Mapping[int, Float[Tensor, " item"]]) -> list[Certificate]:
    """Certify top-r errors; `cost` is `log_sum_exp`, `misses` holds by r the probability that an item is missed."""
    found: list[Certificate] = []
    for r, miss in sorted(misses.items()):
        bound = estimates.mean(cost / math.log1p(r) * ROUNDED_UP)
        found.append(Certificate(r=r, bound=bound, shown=min(1.0, bound.value), error=estimates.mean(miss)))
    return found
