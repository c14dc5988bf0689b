"""The report of an evaluation, `report.json`: every number beside what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from service.contract.diagnostics import PairDiagnostics, Verdict
from service.contract.jobs import Part
from service.contract.losses import Critic
from service.contract.word import Word
from worker.evaluation.calibration import Calibration
from worker.evaluation.certificate import Certificate
from worker.evaluation.completeness import Completeness
from worker.evaluation.ensembles import Fit, Point
from worker.evaluation.estimates import Estimate
from worker.evaluation.geometry import Geometry
from worker.evaluation.margins import Margins
from worker.evaluation.probe import Probe
from worker.jobs.definitions import DEFINITIONS


class EvaluatedDataset(Word):
    """A data set of the evaluation."""

    digest: str
    num_samples: int
    learned_from: Annotated[bool, Field(description="whether the model saw the training split of this data set")]


class Retrieval(Word):
    """How well one modality finds another."""

    source: str
    target: str
    trained: Annotated[bool, Field(description="whether this pair of modalities was trained together")]
    dataset: Annotated[str | None, Field(description="the data set that holds both; null: pooled over all")]
    relevant: Literal["partner", "label"]
    method: Literal["direct", "marginal"]
    through: Annotated[str | None, Field(description="the modality that marginal sums over")] = None
    bridge_size: int | None = None
    num_queries: int
    num_targets: int
    recall: Annotated[dict[int, float], Field(description="by k")]
    precision: Annotated[dict[int, float], Field(description="by k")]
    recall_standard_error: dict[int, float] | None = None
    precision_standard_error: dict[int, float] | None = None
    chance_recall: dict[int, float]
    chance_precision: dict[int, float]
    effective_sample_size: float | None = None
    trusted_fraction: float | None = None


class ZeroShot(Word):
    """How well a modality is classified with labels that were only described to the model."""

    modality: str
    dataset: str
    prompts_modality: str
    prompts: Annotated[
        Literal["given", "training"],
        Field(
            description="given: by the caller, uniform prior; training: of the label's training samples, their prior"
        ),
    ]
    prompts_overlap: Annotated[bool, Field(description="whether evaluated samples are among those of the prompts")]
    num_prompts: int
    num_labels: int
    num_samples: int
    num_left_out: Annotated[int, Field(description="samples without a label, or with one that has no prompt")]
    accuracy: float
    accuracy_standard_error: float | None = None
    chance: Annotated[float, Field(description="one over the number of labels")]
    top: Annotated[dict[int, Estimate] | None, Field(description="top-k accuracy by k")] = None
    chance_top: dict[int, float] | None = None
    cross_entropy: float
    cross_entropy_standard_error: float | None = None


class OfLabels(Word):
    """Which zero-shot classification an entry is about."""

    dataset: str
    modality: str
    prompts_modality: str


class PromptCurve(OfLabels):
    """Zero-shot classification with M prompts per label."""

    num_labels: int
    num_samples: int
    num_draws: Annotated[int, Field(description="of prompts, for each M")]
    prior: Annotated[Literal["uniform", "training"], Field(description="whose logarithm is added to the logits")]
    points: list[Point]
    cross_entropy_fit: Fit | None
    error_fit: Fit | None


class Certified(OfLabels):
    """The certificates of a zero-shot classification."""

    num_samples: int
    certificates: list[Certificate]


class Calibrated(OfLabels):
    """The calibration of a zero-shot classification."""

    calibration: Calibration


class Probed(Word):
    """A linear probe of one modality."""

    dataset: str
    modality: str
    probe: Probe


class OfPair(Word):
    """Which two modalities an entry is about."""

    dataset: str
    first: str
    second: str
    trained: bool


class PairGeometry(OfPair):
    """Alignment, uniformity and gap."""

    geometry: Geometry


class PairMargins(OfPair):
    """Margins."""

    margins: Margins


class PairCompleteness(OfPair):
    """Completeness of the trained score."""

    completeness: Completeness


class LegCalibration(Word):
    """Finding the partner of a trained pair among `num_ways` samples: does softmax(scale * score) mean what it says."""

    dataset: str
    source: str
    target: str
    num_ways: int
    calibration: Calibration
    verdict: Verdict


class PairIndependence(Word):
    """What joins source and target beside the bridge, in samples that hold all three."""

    dataset: str
    num_triples: Annotated[int, Field(description="on which was measured; as many others were fitted to")]
    conditional_information: Estimate
    num_directions: Annotated[int, Field(description="in which they go together by more than chance")]
    verdict: Verdict


class PairComposition(Word):
    """Whether what composition takes for granted holds for a pair that was never trained, over one bridge."""

    source: str
    target: str
    through: str
    diagnostics: PairDiagnostics
    calibration: list[LegCalibration]
    independence: Annotated[
        list[PairIndependence], Field(description="empty: no data set holds all three; pairs alone cannot tell")
    ]


class LeftOut(Word):
    """What was not measured."""

    part: Part
    dataset: str | None
    of: Annotated[str, Field(description="the modality or the pair; empty: the whole data set")]
    reason: str


class Report(Word):
    """All of an evaluation. Format 1 knew retrieval and zero-shot classification only."""

    format: Literal[1, 2] = 2
    model: str
    model_digest: str
    critic: Critic = "cosine"
    split: Literal["holdout", "train", "all"]
    seed: int
    parts: Annotated[list[Part] | None, Field(description="what was asked for; null: all that the data allow")] = None
    datasets: dict[str, EvaluatedDataset]
    retrieval: list[Retrieval]
    zero_shot: list[ZeroShot]
    prompt_curve: list[PromptCurve] = Field(default_factory=list[PromptCurve])
    certificate: list[Certified] = Field(default_factory=list[Certified])
    calibration: list[Calibrated] = Field(default_factory=list[Calibrated])
    linear_probe: list[Probed] = Field(default_factory=list[Probed])
    geometry: list[PairGeometry] = Field(default_factory=list[PairGeometry])
    margins: list[PairMargins] = Field(default_factory=list[PairMargins])
    completeness: list[PairCompleteness] = Field(default_factory=list[PairCompleteness])
    composition: list[PairComposition] = Field(default_factory=list[PairComposition])
    left_out: list[LeftOut] = Field(default_factory=list[LeftOut])
    definitions: dict[str, str] = DEFINITIONS

    def summary(self) -> dict[str, float]:
        """Return the main figures by name, means where there are several data sets or bridges."""
        figures = _of_compositions(self.composition)

        def add(name: str, value: float) -> None:
            figures.setdefault(name, []).append(value)

        for entry in self.retrieval:
            for metric, by_k in (("recall", entry.recall), ("precision", entry.precision)):
                if metric == "recall" or entry.relevant == "label":
                    for k, value in by_k.items():
                        add(f"{metric}@{k}/{entry.source}->{entry.target}/{entry.method}", value)
        for entry in self.zero_shot:
            add(f"zero_shot_accuracy/{entry.modality}", entry.accuracy)
        for entry in self.linear_probe:
            add(f"linear_probe_accuracy/{entry.modality}", entry.probe.accuracy.value)
        for entry in self.calibration:
            add(f"expected_calibration_error/{entry.modality}", entry.calibration.expected_calibration_error.value)
        for entry in self.geometry:
            add(f"alignment/{entry.first}+{entry.second}", entry.geometry.alignment.value)
            add(f"modality_gap/{entry.first}+{entry.second}", entry.geometry.gap.value)
        for entry in self.margins:
            for direction in entry.margins.directions:
                add(f"hardest_margin/{direction.source}->{direction.target}", direction.hardest.value)
        return {name: sum(values) / len(values) for name, values in figures.items()}


def _of_compositions(entries: Sequence[PairComposition]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for entry in entries:
        way, known = f"{entry.source}->{entry.target}/{entry.through}", entry.diagnostics.sum
        found[f"composition_effective_sample_size/{way}"] = [known.effective_sample_size]
        if known.rank_correlation is not None:
            found[f"composition_rank_correlation/{way}"] = [known.rank_correlation]
        if entry.independence:
            nats = [each.conditional_information.value for each in entry.independence]
            found[f"conditional_information/{way}"] = nats
    return found
