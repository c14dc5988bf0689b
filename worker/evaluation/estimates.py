"""A measured number and how far to trust it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
from pydantic import Field

from service.contract.word import Word

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float, Int64
    from torch import Tensor

CONFIDENCE: Final = 0.95


class Estimate(Word):
    """A value with its standard error, or with an interval where the error is not symmetric; null: not to be had."""

    value: float
    standard_error: float | None = None
    interval: Annotated[tuple[float, float] | None, Field(description="95 %, bootstrap percentiles")] = None


def mean(values: Float[Tensor, " sample"]) -> Estimate:
    """Return the mean of independent values with the standard error sd / sqrt(n)."""
    values = values.double()
    num = len(values)
    error = float(values.std()) / math.sqrt(num) if num > 1 else None
    return Estimate(value=float(values.mean()), standard_error=error)


def interval(found: Sequence[float]) -> tuple[float, float]:
    """Return the percentile interval of bootstrap replicates."""
    low, high = np.quantile(np.asarray(found), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high


def bootstrap(
    num_samples: int, figure: Callable[[Int64[np.ndarray, " sample"]], float], seed: int, num_resamples: int = 200
) -> tuple[float, float]:
    """Return the interval of a figure of samples that are drawn again with replacement."""
    rng = np.random.default_rng(seed)
    return interval([figure(rng.integers(num_samples, size=num_samples)) for _ in range(num_resamples)])
