"""The report of an evaluation, `report.json`: every number beside what it means."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from service.contract.word import Word

DEFINITIONS: Final = {
    "recall": "share of the queries whose top k targets hold a relevant one",
    "precision": "mean share of the top k targets that is relevant",
    "relevant: partner": "a target whose payload is the same, byte for byte, as that of the query's own partner: "
    "several samples may share a caption, and none of them is then a mistake",
    "relevant: label": "a target with the query's class label; used for modalities that no data set holds together, so "
    "that there is no partner to find. Queries whose label no target has are left out",
    "chance": "the same figure for scores that are all equal. Equal scores count as random order everywhere",
    "direct": "targets ranked by the cosine of the vectors",
    "marginal": "targets ranked by log mean over the bridge bank of exp(f(source, b) + f(b, target)), with the trained "
    "scales and without each leg's own offset (Che & Eysenbach 2025, Lemma 1)",
    "effective_sample_size": "Kish's, of the marginal sum: median over the targets, then over the queries",
    "trusted_fraction": "share of the queries whose median effective sample size is at least 10; for the others trust "
    "the order of the targets and not the values",
    "accuracy": "share of the samples whose label has the largest logit",
    "cross_entropy": "mean of -log p(label | sample), nats",
    "zero-shot logit": "log prior + log mean over the label's prompts of exp(scale * cosine) (Oko et al. 2025)",
}


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
    chance: Annotated[float, Field(description="one over the number of labels")]
    cross_entropy: float


class Report(Word):
    """All of an evaluation."""

    format: Literal[1] = 1
    model: str
    model_digest: str
    split: Literal["holdout", "train", "all"]
    seed: int
    datasets: dict[str, EvaluatedDataset]
    retrieval: list[Retrieval]
    zero_shot: list[ZeroShot]
    definitions: dict[str, str] = DEFINITIONS

    def summary(self) -> dict[str, float]:
        """Return the main figures by name, means where there are several data sets or bridges."""
        figures: dict[str, list[float]] = {}
        for entry in self.retrieval:
            for metric, by_k in (("recall", entry.recall), ("precision", entry.precision)):
                if metric == "recall" or entry.relevant == "label":
                    for k, value in by_k.items():
                        name = f"{metric}@{k}/{entry.source}->{entry.target}/{entry.method}"
                        figures.setdefault(name, []).append(value)
        for entry in self.zero_shot:
            figures.setdefault(f"zero_shot_accuracy/{entry.modality}", []).append(entry.accuracy)
        return {name: sum(values) / len(values) for name, values in figures.items()}
