"""The experiments that a worker can run: claims of papers, checked on data whose truth is known, and their reports.

Torch-free, so that the command line and the API can name them. What an experiment does is in `worker/theory/`.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from service.contract.word import Word

ExperimentName = Literal[
    "square-loss",
    "certificate",
    "completeness",
    "temperature-margin",
    "one-sided",
    "batch-size",
    "k-sample",
    "mazes",
    "closed-forms",
    "discrete-exact",
    "concentration",
    "separate-models",
    "dropped-scale",
    "assumption-a1",
    "estimator-honesty",
    "gaussian-table",
]
"""For ever, as job rows hold them; a new one goes to the end."""

Paper = Literal["clip-transfer", "sufficiency", "unpaired"]
Verdict = Literal["holds", "fails", "reported"]
"""reported: nothing was asserted, so there is nothing that could fail."""

PAPERS: Final[dict[Paper, str]] = {
    "clip-transfer": "Chen, Deng, Li, Gu: Understanding Transferable Representation Learning and Zero-shot Transfer in "
    "CLIP, ICLR 2024, arXiv 2310.00927",
    "sufficiency": "Oko, Lin, Cai, Mei: A Statistical Theory of Contrastive Pre-training and Multimodal Generative AI, "
    "2025, arXiv 2501.04641",
    "unpaired": 'Che, Eysenbach: The "Law" of the Unconscious Contrastive Learner: Probabilistic Alignment of Unpaired '
    "Modalities, ICLR 2025, arXiv 2501.11326",
}


class Experiment(Word):
    """A claim and where it is made."""

    name: ExperimentName
    paper: Paper
    place: Annotated[str, Field(description="section, theorem or figure of the paper")]
    claim: str
    seeds: Annotated[int, Field(description="independent repetitions unless the caller wants another number")] = 3
    duration_s: Annotated[float, Field(description="about how long it takes on one core")]


EXPERIMENTS: Final[dict[ExperimentName, Experiment]] = {
    each.name: each
    for each in (
        Experiment(
            name="square-loss",
            paper="clip-transfer",
            place="section 5, definition 5.3 and the comparison with the square loss",
            claim="Features learned by regression (square loss) do not transfer zero-shot when each modality carries "
            "large features of its own; contrastive ones do.",
            duration_s=60,
        ),
        Experiment(
            name="certificate",
            paper="clip-transfer",
            place="corollary 5.1",
            claim="The top-r zero-shot error is at most the mean of log sum_k exp(f(x, y_k) - f(x, y*)) over "
            "log(1 + r), for every model.",
            duration_s=15,
        ),
        Experiment(
            name="completeness",
            paper="clip-transfer",
            place="assumption 4.1 and lemma 5.4",
            claim="On the case study the score of the shared features is (0, 0, gamma)-complete.",
            duration_s=15,
        ),
        Experiment(
            name="temperature-margin",
            paper="clip-transfer",
            place="remark 4.4 and figure 3",
            claim="A lower temperature gives a larger margin.",
            duration_s=90,
        ),
        Experiment(
            name="one-sided",
            paper="clip-transfer",
            place="section 6",
            claim="Pulling positive pairs together, and leaving negatives alone, enlarges the margin and does not harm "
            "zero-shot transfer.",
            duration_s=80,
        ),
        Experiment(
            name="batch-size",
            paper="clip-transfer",
            place="theorem 4.2 and remark 4.5",
            claim="A batch of the order of 1 / min p_k is enough: a larger one gains nothing.",
            duration_s=105,
        ),
        Experiment(
            name="k-sample",
            paper="sufficiency",
            place="section 3, the K-sample risk",
            claim="The excess contrastive risk of a score is its insufficiency; few negatives under-report it.",
            duration_s=100,
        ),
        Experiment(
            name="mazes",
            paper="unpaired",
            place="section 6.3 and appendix D",
            claim="An agent that learned where its actions lead, and which labels hold where, finds a label that "
            "names a whole row or column more often by summing over states than by comparing actions with labels.",
            duration_s=240,
        ),
        Experiment(
            name="closed-forms",
            paper="unpaired",
            place="lemmas 2 and 3",
            claim="Where the bridge is even on the sphere, or normal, the sum over it has a closed form, which on the "
            "sphere grows with the inner product of what is compared.",
            duration_s=5,
        ),
        Experiment(
            name="discrete-exact",
            paper="unpaired",
            place="lemma 1",
            claim="Summing exp(f(a, b) + f(b, c)) over the bridge gives p(c | a) / p(c): exactly with exact critics, "
            "and nearly with learned ones, where comparing vectors directly does not.",
            duration_s=20,
        ),
        Experiment(
            name="concentration",
            paper="unpaired",
            place="assumption A3",
            claim="Comparing vectors directly ranks as the sum does only while the bridge lies evenly on the sphere.",
            duration_s=15,
        ),
        Experiment(
            name="separate-models",
            paper="unpaired",
            place="section 6.1",
            claim="Models trained apart can be composed by summing over the bridge, nearly as well as if they had been "
            "trained on the pair itself, and not by comparing their vectors.",
            duration_s=120,
        ),
        Experiment(
            name="dropped-scale",
            paper="unpaired",
            place="figure 2 (c) and its errata",
            claim="The learned logit scale belongs into the sum: without it sums of cosines hardly rank.",
            duration_s=30,
        ),
        Experiment(
            name="assumption-a1",
            paper="unpaired",
            place="assumption A1 and figure 8, with its errata",
            claim="What the two ends share past the bridge is lost to composition; triples show it, pairs cannot.",
            seeds=10,
            duration_s=20,
        ),
        Experiment(
            name="estimator-honesty",
            paper="unpaired",
            place="the Monte Carlo estimator of section 4",
            claim="The effective sample size of a sum tells whether its value and its error bar can be believed.",
            duration_s=40,
        ),
        Experiment(
            name="gaussian-table",
            paper="unpaired",
            place="section 6.1, the synthetic table of the later code",
            claim="With 100,000 bridge items sums come near Bayes, with exact ratios as with learned critics of shared "
            "or separate models.",
            duration_s=150,
        ),
    )
}


class Bar(Word):
    """What a figure must reach for the claim to hold."""

    relation: Literal["at most", "at least"]
    bound: float
    over: Annotated[
        Literal["every seed", "mean"], Field(description="every seed: each must reach it; mean: the mean over seeds")
    ] = "every seed"


class Finding(Word):
    """A figure that was measured, and what was expected of it."""

    name: str
    definition: str
    expected: Annotated[str, Field(description="by the paper, or by what was measured before; says which")]
    per_seed: Annotated[list[float], Field(min_length=1)]
    mean: float
    interval: Annotated[
        tuple[float, float] | None, Field(description="95 % for the mean over seeds (Student's t); null: one seed")
    ]
    bar: Bar | None
    verdict: Verdict


class Curve(Word):
    """What is drawn: some series over the same x, with every seed's own values."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: list[float]
    log_x: bool = False
    log_y: bool = False
    series: Annotated[dict[str, list[list[float]]], Field(description="name -> by seed -> by x")]
    marks: Annotated[dict[str, float], Field(description="name -> an x that matters, such as 1 / min p_k")]


class Panel(Word):
    """Paths on a floor plan, in cells: (row, column) from the upper left corner."""

    title: str
    goal: Annotated[list[tuple[int, int]], Field(description="cells to be reached")]
    paths: list[list[tuple[float, float]]]
    reached: Annotated[list[bool], Field(description="by path")]


class Map(Word):
    """What is drawn of walks: panels of one floor plan, two side by side."""

    name: str
    title: str
    walls: Annotated[list[list[bool]], Field(description="by row, by column")]
    panels: list[Panel]


class ExperimentReport(Word):
    """All of a run of an experiment."""

    format: Literal[1] = 1
    experiment: ExperimentName
    paper: str
    place: str
    claim: str
    set_up: Annotated[list[str], Field(description="how it was done, in sentences")]
    seeds: list[int]
    quick: bool
    findings: list[Finding]
    notes: Annotated[list[str], Field(description="what the figures do not say by themselves")]
    curves: list[Curve]
    maps: Annotated[list[Map], Field(default_factory=list[Map])]
    verdict: Verdict
    seconds: float
    cpu_seconds: float
    code_version: str
    torch: str
