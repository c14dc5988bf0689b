"""Whether probabilities mean what they say: expected calibration error, reliability, and the temperature that helps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final

import numpy as np
import torch
from pydantic import Field

from service.contract.word import Word
from worker.evaluation import estimates
from worker.evaluation.estimates import Estimate
from worker.learning import retrieval

if TYPE_CHECKING:
    from jaxtyping import Float64, Int64
    from torch import Tensor

FEWEST: Final = 10  # samples
NUM_BINS: Final = 15
LARGEST_TEMPERATURE: Final = 1e3  # and the smallest is one over it
HALVINGS: Final = 60


class Bin(Word):
    """The samples whose largest probability is above `lower`, at most `upper`."""

    lower: float
    upper: float
    num_samples: int
    confidence: Annotated[float | None, Field(description="mean of the largest probability; null: no samples")]
    accuracy: Annotated[Estimate | None, Field(description="share that is right")]


class Calibration(Word):
    """Reliability before and after one temperature."""

    num_samples: int
    expected_calibration_error: Estimate
    cross_entropy: Estimate
    reliability: list[Bin]
    temperature: Annotated[float, Field(description="that minimises the cross-entropy of one half of the samples")]
    temperature_at_limit: Annotated[bool, Field(description="the best lies beyond what was searched")]
    num_fitted: int
    num_measured: Annotated[int, Field(description="the other half, on which the rest was measured")]
    expected_calibration_error_before: Estimate
    expected_calibration_error_after: Estimate
    cross_entropy_before: Estimate
    cross_entropy_after: Estimate


def expected_calibration_error(
    confidence: Float64[Tensor, " item"], hit: Float64[Tensor, " item"], num_bins: int
) -> float:
    """Return sum over bins of share * |accuracy - mean confidence|, bins of equal width (Naeini et al. 2015)."""
    at = _bin_of(confidence, num_bins)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(0, at, hit - confidence)
    return float(gaps.abs().sum()) / len(confidence)


def fit_temperature(logits: Float64[Tensor, "item label"], truth: Int64[Tensor, " item"]) -> tuple[float, bool]:
    """Return the temperature T with the least cross-entropy of softmax(logits / T), and whether it is at the limit.

    The cross-entropy is convex in 1 / T (Guo et al. 2017), so its slope is halved towards zero.
    """
    logits = logits - logits.amax(1, keepdim=True)
    chosen = logits.gather(1, truth[:, None]).mean()

    def slope(inverse: float) -> float:
        return float((logits * (inverse * logits).softmax(1)).sum(1).mean() - chosen)

    low, high = -math.log(LARGEST_TEMPERATURE), math.log(LARGEST_TEMPERATURE)
    if slope(math.exp(high)) <= 0:
        return 1 / LARGEST_TEMPERATURE, True
    if slope(math.exp(low)) >= 0:
        return LARGEST_TEMPERATURE, True
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-(low + high) / 2), False


def measure(
    logits: Float64[Tensor, "item label"], truth: Int64[Tensor, " item"], num_bins: int, seed: int
) -> Calibration:
    """Measure the calibration of softmax(logits); a random half fits the temperature, the other one measures it.

    Needs `FEWEST` items or more.
    """
    log_p = logits.log_softmax(1)
    confidence, hit = _confidence(log_p, truth)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)))
    fitted, rest = order[: len(order) // 2], order[len(order) // 2 :]
    temperature, at_limit = fit_temperature(log_p[fitted], truth[fitted])
    cooled = (log_p[rest] / temperature).log_softmax(1)
    return Calibration(
        num_samples=len(logits),
        expected_calibration_error=_with_interval(confidence, hit, num_bins, seed),
        cross_entropy=_cross_entropy(log_p, truth),
        reliability=_reliability(confidence, hit, num_bins),
        temperature=temperature,
        temperature_at_limit=at_limit,
        num_fitted=len(fitted),
        num_measured=len(rest),
        expected_calibration_error_before=_with_interval(confidence[rest], hit[rest], num_bins, seed),
        expected_calibration_error_after=_with_interval(*_confidence(cooled, truth[rest]), num_bins, seed),
        cross_entropy_before=_cross_entropy(log_p[rest], truth[rest]),
        cross_entropy_after=_cross_entropy(cooled, truth[rest]),
    )


def _confidence(
    log_p: Float64[Tensor, "item label"], truth: Int64[Tensor, " item"]
) -> tuple[Float64[Tensor, " item"], Float64[Tensor, " item"]]:
    hit, _ = retrieval.hits_at_k(log_p, torch.arange(log_p.shape[1]) == truth[:, None], 1)
    return log_p.amax(1).exp(), hit


def _cross_entropy(log_p: Float64[Tensor, "item label"], truth: Int64[Tensor, " item"]) -> Estimate:
    return estimates.mean(-log_p.gather(1, truth[:, None]).squeeze(1))


def _bin_of(confidence: Float64[Tensor, " item"], num_bins: int) -> Int64[Tensor, " item"]:
    return (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)


def _with_interval(
    confidence: Float64[Tensor, " item"], hit: Float64[Tensor, " item"], num_bins: int, seed: int
) -> Estimate:
    def of(chosen: Int64[np.ndarray, " sample"]) -> float:
        at = torch.from_numpy(chosen)
        return expected_calibration_error(confidence[at], hit[at], num_bins)

    value = expected_calibration_error(confidence, hit, num_bins)
    return Estimate(value=value, interval=estimates.bootstrap(len(hit), of, seed))


def _reliability(confidence: Float64[Tensor, " item"], hit: Float64[Tensor, " item"], num_bins: int) -> list[Bin]:
    at = _bin_of(confidence, num_bins)
    found: list[Bin] = []
    for index in range(num_bins):
        inside = at == index
        num = int(inside.sum())
        found.append(
            Bin(
                lower=index / num_bins,
                upper=(index + 1) / num_bins,
                num_samples=num,
                confidence=float(confidence[inside].mean()) if num else None,
                accuracy=estimates.mean(hit[inside]) if num else None,
            )
        )
    return found
