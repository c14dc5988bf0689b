"""What is known of a composition before anybody asks for one: do the assumptions hold, and which method to use.

Che & Eysenbach 2025 assume that source and target are independent given the bridge (A1), that scores are log-ratios but
for a constant (A2), and, for comparing vectors directly, that the bridge lies evenly (A3).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.contract.losses import Critic
from service.contract.word import Word

Verdict = Annotated[
    Literal["passes", "doubtful", "fails"], Field(description="by thresholds that docs/composition.md lists")
]


class SphereFigures(Word):
    """How evenly directions lie around (A3 of the cosine). With many items a p-value is tiny: judge the sizes then."""

    num_items: int
    dimensions: int
    resultant: Annotated[float, Field(description="length of the mean unit vector, 0 if even")]
    largest_axis: Annotated[float, Field(description="d times the largest eigenvalue of mean u u^T, 1 if even")]
    rayleigh: Annotated[float, Field(description="d n |mean u|^2: chi-squared with d degrees of freedom if even")]
    rayleigh_p: Annotated[float, Field(description="chance of as much, if even")]
    bingham: Annotated[float, Field(description="d (d + 2) n / 2 (tr T^2 - 1 / d), T = mean u u^T")]
    bingham_p: Annotated[float, Field(description="chance of as much, if even: (d - 1)(d + 2) / 2 degrees of freedom")]
    projection_distance: Annotated[
        float, Field(description="largest Kolmogorov-Smirnov distance of projections from their Beta law")
    ]
    projection_p: Annotated[float, Field(description="chance of as much, if even, over all directions tried")]
    log_potential: Annotated[float, Field(description="log mean exp(-2 |u - u'|^2) (Wang & Isola 2020)")]
    log_potential_if_even: float
    verdict: Verdict


class NormalFigures(Word):
    """How near vectors are to a round normal distribution around 0 (A3 of the squared distance)."""

    num_items: int
    dimensions: int
    axis_mean: Annotated[float, Field(description="largest |mean| of a coordinate, over the mean deviation")]
    axis_variance: Annotated[tuple[float, float], Field(description="least and largest variance of a coordinate")]
    axis_kurtosis: Annotated[
        tuple[float, float], Field(description="least and largest excess kurtosis of a coordinate, 0 if normal")
    ]
    excess_kurtosis: Annotated[float, Field(description="mean over the coordinates")]
    elongation: Annotated[float, Field(description="largest over mean eigenvalue of the covariance, 1 if round")]
    verdict: Verdict


class LegFigures(Word):
    """Whether the scores of a trained pair are log-ratios (A2): E e^f is then one constant for all items."""

    end: Annotated[str, Field(description="the modality beside the bridge's")]
    scale: Annotated[float, Field(description="the trained logit scale")]
    end_offset_deviation: Annotated[
        float, Field(description="deviation over items of the end of log mean over the bridge e^f, nats")
    ]
    bridge_offset_deviation: Annotated[
        float, Field(description="deviation over bridge items of log mean over the end e^f, nats")
    ]
    verdict: Verdict


class SumFigures(Word):
    """How well the sum over the bridge is estimated, and whether comparing vectors says the same."""

    num_sources: int
    num_targets: int
    effective_sample_size: Annotated[float, Field(description="Kish; median over the targets, then over the sources")]
    sample_size_verdict: Verdict
    rank_correlation: Annotated[
        float | None, Field(description="Spearman's, of direct and marginal scores, median over the sources")
    ]
    best_agreement: Annotated[float, Field(description="share of the sources whose best target is the same by both")]
    agreement_verdict: Verdict


class PairDiagnostics(Word):
    """A pair of modalities that was never trained, over one bridge: figures from the banks that the model keeps.

    A few items of either bank stand for sources and targets and are not part of the bridge.
    """

    bridge_size: Annotated[int, Field(description="bridge items over which was summed")]
    method: Annotated[Literal["direct", "marginal"], Field(description="to be used")]
    reason: str
    first: LegFigures
    second: LegFigures
    sphere: Annotated[SphereFigures | None, Field(description="of the bridge; null for the squared distance")]
    normal: Annotated[NormalFigures | None, Field(description="of the bridge; null for the cosine")]
    sum: SumFigures


class ModelComposition(Word):
    """A pair of modalities, source to target, that a model can only compose."""

    object: Literal["model.composition"] = "model.composition"
    from_: Annotated[str, Field(alias="from")]
    to: str
    through: Annotated[str | None, Field(description="the modality that was trained with both; null: there is none")]
    critic: Critic
    method: Annotated[Literal["direct", "marginal"] | None, Field(description="to be used; null: nothing tells")]
    reason: str
    diagnostics: Annotated[PairDiagnostics | None, Field(description="null: the model keeps no bank of both legs")]


class ModelCompositionList(Word):
    """Every way from one modality to another that was never paired with it, over each possible bridge."""

    object: Literal["list"] = "list"
    data: list[ModelComposition]
