"""How far a pair scores above what is no pair, in batches as a loss sees them, and what a temperature makes of it.

The margin to the hardest negative and that to the mean negative can move in opposite directions when the temperature
of training changes, so both are measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

import torch
from pydantic import Field

from service.contract.word import Word
from worker.evaluation import estimates
from worker.evaluation.estimates import Estimate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Bool, Float, Float64
    from torch import Tensor

BATCH: Final = 64
LEVELS: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
FACTORS: Final = tuple(2.0**power for power in range(-4, 5))


class Histogram(Word):
    """Counts between edges."""

    edges: list[float]
    counts: list[int]


class Direction(Word):
    """Margins of one side as the query."""

    source: str
    target: str
    hardest: Annotated[Estimate, Field(description="mean of s(pair) - largest s(query, negative)")]
    mean_negative: Annotated[Estimate, Field(description="mean of s(pair) - mean s(query, negative)")]
    positive_share: Annotated[Estimate, Field(description="share of the queries whose hardest margin is above 0")]
    quantiles: Annotated[dict[str, float], Field(description="of the hardest margin")]
    histogram: Annotated[Histogram, Field(description="of the hardest margin")]


class Softened(Word):
    """What a temperature makes of the same vectors, mean of both directions."""

    temperature: float
    cross_entropy: Annotated[Estimate, Field(description="-log p(partner), among it and the batch's negatives")]
    partner_probability: Estimate


class Margins(Word):
    """The margins of one pair of modalities."""

    classes: Annotated[Literal["label", "payload"], Field(description="what makes two samples negatives")]
    batch_size: int
    num_batches: int
    num_queries: Annotated[int, Field(description="of each direction: samples with a negative in their batch")]
    positive_score: Annotated[Estimate, Field(description="mean score of partners, in units of the critic")]
    scale: Annotated[float | None, Field(description="trained logit scale; null: the pair was not trained")]
    temperature: Annotated[float | None, Field(description="one over the scale")]
    directions: list[Direction]
    by_temperature: Annotated[list[Softened], Field(description="empty: the pair was not trained")]


def measure(
    batches: Iterable[tuple[Float[Tensor, "item item"], Bool[Tensor, "item item"]]],
    names: tuple[str, str],
    classes: Literal["label", "payload"],
    scale: float | None,
    num_bins: int,
) -> Margins | str:
    """Measure both directions; returns a reason if no batch has a negative.

    A batch is its scores of row against column, partners on the diagonal, and which columns are negatives of the row
    (and rows of the column). Samples of one batch share their negatives, so errors come from the spread of the batches'
    own means, and are null for a single batch.
    """
    temperatures = [factor / scale for factor in FACTORS] if scale else []
    positives: list[Tensor] = []
    margins: list[list[tuple[Tensor, Tensor]]] = [[], []]
    costs: list[Tensor] = []  # (temperature, 2 directions * queries)
    size = 0
    for scores, negatives in batches:
        kept = negatives.any(1)
        if not kept.any():
            continue
        size = max(size, len(scores))
        positives.append(scores.diagonal().double())
        found: list[Tensor] = []
        for side, (rows, mask) in enumerate(((scores, negatives), (scores.T, negatives.T))):
            gaps = (rows.diagonal()[:, None] - rows).double()[kept]
            margins[side].append(_of(gaps, mask[kept]))
            found.append(_cost(gaps, mask[kept], temperatures))
        costs.append(torch.cat(found, 1))
    if not positives:
        return "no batch holds two classes: there are no negatives"
    return Margins(
        classes=classes,
        batch_size=size,
        num_batches=len(positives),
        num_queries=sum(len(hardest) for hardest, _ in margins[0]),
        positive_score=_mean(positives),
        scale=scale,
        temperature=None if scale is None else 1 / scale,
        directions=[
            _direction(margins[0], names[0], names[1], num_bins),
            _direction(margins[1], names[1], names[0], num_bins),
        ],
        by_temperature=[
            Softened(
                temperature=temperature,
                cross_entropy=_mean([cost[at] for cost in costs]),
                partner_probability=_mean([(-cost[at]).exp() for cost in costs]),
            )
            for at, temperature in enumerate(temperatures)
        ],
    )


def _of(
    gaps: Float64[Tensor, "query item"], negatives: Bool[Tensor, "query item"]
) -> tuple[Float64[Tensor, " query"], Float64[Tensor, " query"]]:
    """Return the margin to the hardest and to the mean negative."""
    hardest = gaps.masked_fill(~negatives, float("inf")).amin(1)
    return hardest, gaps.masked_fill(~negatives, 0.0).sum(1) / negatives.sum(1)


def _cost(
    gaps: Float64[Tensor, "query item"], negatives: Bool[Tensor, "query item"], temperatures: Sequence[float]
) -> Float64[Tensor, "temperature query"]:
    """Return log(1 + sum over negatives of exp(-gap / temperature))."""
    rows = [
        torch.nn.functional.softplus((-gaps / temperature).masked_fill(~negatives, -float("inf")).logsumexp(1))
        for temperature in temperatures
    ]
    return torch.stack(rows) if rows else gaps.new_empty(0, len(gaps))


def _mean(batches: Sequence[Float64[Tensor, " query"]]) -> Estimate:
    value = float(torch.cat(list(batches)).mean())
    own = estimates.mean(torch.stack([batch.mean() for batch in batches]))
    return Estimate(value=value, standard_error=own.standard_error)


def _direction(
    batches: Sequence[tuple[Float64[Tensor, " query"], Float64[Tensor, " query"]]],
    source: str,
    target: str,
    num_bins: int,
) -> Direction:
    hardest = torch.cat([batch for batch, _ in batches])
    low, high = float(hardest.min()), float(hardest.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, num_bins + 1, dtype=torch.float64)
    at = torch.bucketize(hardest, edges[1:-1])
    return Direction(
        source=source,
        target=target,
        hardest=_mean([batch for batch, _ in batches]),
        mean_negative=_mean([batch for _, batch in batches]),
        positive_share=_mean([(batch > 0).double() for batch, _ in batches]),
        quantiles={
            f"{level:.2f}": value
            for level, value in zip(
                LEVELS, hardest.quantile(torch.tensor(LEVELS, dtype=torch.float64)).tolist(), strict=True
            )
        },
        histogram=Histogram(edges=edges.tolist(), counts=torch.bincount(at, minlength=num_bins).tolist()),
    )
