"""What a job is: one args class per kind, its lane, how often and how long it may run.

A kind string is for ever: a row written today is worked years from now. `tests/service/contract/test_jobs.py` freezes
the list, append-only. A job carries ids, never documents.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, StrictBool, StrictInt, TypeAdapter, field_validator, model_validator
from typing_extensions import TypedDict

from service.contract.experiments import EXPERIMENTS, ExperimentName, Verdict
from service.contract.imports import local_path
from service.contract.losses import Critic
from service.contract.operations import MAX_WEIGHTS, AnySetThrough, BridgeWeights, EmbeddingSetRef, Leg, TopK
from service.contract.recipe import Budget, Recipe
from service.contract.word import Id, ModalityName, Name, Real, Text, Word

Lane = Literal["train", "bulk"]
State = Literal["scheduled", "queued", "running", "succeeded", "failed", "cancelled"]
Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class Input(TypedDict):
    """An artifact that a job reads; `id` is the row's, or `job_x@<step>` for a checkpoint."""

    artifact: str
    digest: str
    id: str
    kind: Literal["model", "dataset", "embeddings"]


class Holdout(Word):
    """The part of a data set that training never sees: a share of it, or the groups that are named."""

    fraction: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[StrictInt, Field(ge=0, le=2**31)] = 0
    group_by: Annotated[
        Text | None,
        Field(
            description="a metadata field (a JSON member's key or a column): its groups stay on one side",
            max_length=200,
        ),
    ] = None
    groups: Annotated[
        list[Text] | None,
        Field(
            description="values of group_by: all of these groups and nothing else is held out; takes no fraction",
            min_length=1,
            max_length=1000,
        ),
    ] = None

    @model_validator(mode="after")
    def _groups_are_drawn_or_named(self) -> Holdout:
        if self.groups is not None and self.group_by is None:
            msg = "groups are values of a metadata field: name it in group_by"
            raise ValueError(msg)
        if self.groups is not None and self.fraction > 0:
            msg = "fraction draws the groups and groups names them: give one of the two"
            raise ValueError(msg)
        return self


class IngestArgs(Word):
    """Read a data set, validate every sample, write the good ones in our own layout."""

    kind: Literal["ingest"] = "ingest"
    dataset: Id
    source: Annotated[Text, Field(description="URI of what was uploaded or registered")]
    modalities: Annotated[
        dict[ModalityName, Text] | None,
        Field(description="modality -> member extension or column; null: recognised by extension and column name"),
    ] = None
    max_bad_fraction: Annotated[Real, Field(ge=0, le=1)] = 0.1
    holdout: Holdout | None = None


class TrainArgs(Word):
    """Train a recipe into a model."""

    kind: Literal["train"] = "train"
    recipe: Recipe
    name: Annotated[Name | None, Field(description="an alias that the new model takes over when it is ready")] = None


class EmbedArgs(Word):
    """Embed one modality of a data set with a model into an embedding set."""

    kind: Literal["embed"] = "embed"
    model: Annotated[Id, Field(description="a model's id or alias, or job_x@latest, job_x@<step>")]
    dataset: Id
    modality: ModalityName
    split: Literal["train", "holdout", "all"] = "all"
    batch_size: Annotated[StrictInt, Field(ge=1, le=65_536)] = 256


class SamplesRef(Word):
    """A data set's samples in one modality, which the job embeds first with the model of the leg they stand at."""

    dataset: Id
    modality: ModalityName
    split: Literal["train", "holdout", "all"] = "all"


class ComposeArgs(Word):
    """Find for every vector of one set the best of another, across modalities that need not have been paired.

    When it is submitted the way is chosen, and written down as `legs`.
    """

    kind: Literal["compose"] = "compose"
    source: EmbeddingSetRef | SamplesRef
    target: EmbeddingSetRef | SamplesRef
    model: Annotated[Id | None, Field(description="one model that holds both legs; or give `legs`")] = None
    legs: Annotated[list[Leg] | None, Field(min_length=1, max_length=8)] = None
    through: Annotated[
        AnySetThrough,
        Field(
            description="the bridge: a modality (its bank is used) or an embedding set, for legs of two models one of "
            "each model over the same samples; null: the model's bank. For more than two legs a list of joints, one "
            "between each two legs; null: all from banks"
        ),
    ] = None
    bridge_weights: Annotated[
        BridgeWeights | None,
        Field(description="as for POST /v1/compose, of the set in `through`; null: all alike", max_length=MAX_WEIGHTS),
    ] = None
    method: Annotated[
        Literal["auto", "direct", "marginal", "analytic"],
        Field(
            description="as for POST /v1/compose; auto: what the legs leave open, the first sources settle, and for all"
        ),
    ] = "auto"
    prior: Annotated[
        list[Annotated[Real, Field(ge=0)]] | None,
        Field(
            description="prior weight of each target, scaled to sum 1; null: uniform over the targets",
            min_length=1,
            max_length=MAX_WEIGHTS,
        ),
    ] = None
    top_k: TopK = 10


Part = Literal[
    "retrieval",
    "zero_shot",
    "prompt_curve",
    "certificate",
    "calibration",
    "linear_probe",
    "geometry",
    "margins",
    "completeness",
    "composition",
]
"""What an evaluation measures; docs/evaluation.md says what each of them is."""

_READ_BY: Final[dict[str, tuple[Part, ...]]] = {
    "ks": ("retrieval", "zero_shot", "certificate"),
    "prompts": ("zero_shot", "prompt_curve", "certificate", "calibration"),
    "max_prompts": ("zero_shot", "prompt_curve", "certificate", "calibration"),
    "bins": ("calibration", "margins", "composition"),
}


class EvaluateArgs(Word):
    """Measure a model on held-out data: retrieval, zero-shot classification, and how far both can be trusted."""

    kind: Literal["evaluate"] = "evaluate"
    model: Annotated[Id, Field(description="a model's id or alias, or job_x@latest, job_x@<step>")]
    datasets: Annotated[list[Id], Field(min_length=1, max_length=64)]
    split: Annotated[
        Literal["holdout", "train", "all"],
        Field(description="train and all are refused for data the model learned from unless allow_training_data"),
    ] = "holdout"
    allow_training_data: StrictBool = False
    parts: Annotated[
        list[Part] | None,
        Field(description="what to measure; null: all that the data allow", min_length=1, max_length=10),
    ] = None
    ks: Annotated[
        list[Annotated[StrictInt, Field(ge=1, le=1000)]] | None,
        Field(
            description="the k of recall@k, of zero-shot top-k and of its certificate; null: 1, 5, 10",
            min_length=1,
            max_length=10,
        ),
    ] = None
    prompts: Annotated[
        dict[Text, list[Text]] | None,
        Field(description="label -> prompts for zero-shot; null: the captions of the label's training samples"),
    ] = None
    max_prompts: Annotated[
        StrictInt | None,
        Field(description="prompts per label, drawn from its training samples; null: 250", ge=1, le=10_000),
    ] = None
    bins: Annotated[
        StrictInt | None,
        Field(description="of the reliability table and of the histograms of margins; null: 15", ge=2, le=100),
    ] = None
    max_samples: Annotated[StrictInt, Field(ge=2, le=100_000, description="per data set, drawn with the seed")] = 2000
    seed: Annotated[StrictInt, Field(ge=0, le=2**31)] = 0

    @field_validator("prompts")
    @classmethod
    def _every_label_has_a_prompt(cls, prompts: dict[str, list[str]] | None) -> dict[str, list[str]] | None:
        if prompts is not None and len(prompts) < 2:
            msg = "there is nothing to tell apart with fewer than two labels"
            raise ValueError(msg)
        if empty := [label for label, texts in (prompts or {}).items() if not texts]:
            msg = f"label {empty[0]!r} has no prompt"
            raise ValueError(msg)
        return prompts

    @field_validator("parts")
    @classmethod
    def _every_part_once(cls, parts: list[Part] | None) -> list[Part] | None:
        if twice := sorted({part for part in parts or [] if parts and parts.count(part) > 1}):
            msg = f"{twice[0]} is named twice"
            raise ValueError(msg)
        return parts

    @model_validator(mode="after")
    def _fields_fit(self) -> EvaluateArgs:
        if self.parts and "linear_probe" in self.parts and self.split != "holdout":
            msg = f"parts: linear_probe learns from split train and is measured on split holdout, not on {self.split}"
            raise ValueError(msg)
        if self.prompts is not None and self.max_prompts is not None:
            msg = "max_prompts limits what is drawn from training samples, and prompts are given"
            raise ValueError(msg)
        for name, readers in _READ_BY.items():
            if self.parts and getattr(self, name) is not None and not set(readers) & set(self.parts):
                msg = f"{name}: none of the parts reads it; {', '.join(readers)} would"
                raise ValueError(msg)
        return self


class ExperimentArgs(Word):
    """Check a claim of a paper on data whose truth is known; reads nothing."""

    kind: Literal["experiment"] = "experiment"
    experiment: ExperimentName
    seeds: Annotated[
        StrictInt | None, Field(ge=1, le=100, description="independent repetitions; null: the experiment's own number")
    ] = None
    seed: Annotated[StrictInt, Field(ge=0, le=2**31, description="of the first repetition, the next has the next")] = 0
    quick: Annotated[
        StrictBool, Field(description="a tenth of the work, to see it run: nothing is asserted of its figures")
    ] = False


class ImportModelArgs(Word):
    """Import a model that was trained elsewhere, from the files of a Hugging Face checkpoint."""

    kind: Literal["import_model"] = "import_model"
    source: Annotated[
        Text,
        Field(
            description="folder of the checkpoint: s3://, gs://, az://, an absolute path in one of the worker's "
            "folders for imports (the key needs the scope admin), or org/name of a hub, where the worker has one",
            min_length=1,
            max_length=1024,
        ),
    ]
    name: Annotated[Name | None, Field(description="an alias that the new model takes over when it is ready")] = None
    modalities: Annotated[
        dict[Literal["image", "text", "audio"], ModalityName] | None,
        Field(description="medium -> the modality's name in the new model; null: the medium's"),
    ] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Field(description="of serving; auto: bf16 autocast on CUDA, fp32 elsewhere")
    ] = "fp32"

    @field_validator("source")
    @classmethod
    def _says_where(cls, source: str) -> str:
        path = local_path(source)
        is_place = path.is_absolute() if path is not None else "::" not in source  # a place within a place
        if not is_place or "\0" in source:
            msg = "a checkpoint lies at s3://, gs://, az://, at an absolute path, or is org/name of a hub"
            raise ValueError(msg)
        return source

    @field_validator("modalities")
    @classmethod
    def _names_differ(cls, modalities: dict[str, str] | None) -> dict[str, str] | None:
        if modalities is not None and len(set(modalities.values())) < len(modalities):
            msg = "two media cannot be one modality"
            raise ValueError(msg)
        return modalities


JobArgs = Annotated[
    IngestArgs | TrainArgs | EmbedArgs | EvaluateArgs | ExperimentArgs | ImportModelArgs | ComposeArgs,
    Field(discriminator="kind"),
]
"""Every kind of job that a worker of this version runs."""

SubmittableArgs = Annotated[
    TrainArgs | EmbedArgs | EvaluateArgs | ExperimentArgs | ImportModelArgs | ComposeArgs, Field(discriminator="kind")
]
"""The kinds that a caller creates with POST /v1/jobs; an ingest job comes with its data set."""

AnyArgs = IngestArgs | TrainArgs | EmbedArgs | EvaluateArgs | ExperimentArgs | ImportModelArgs | ComposeArgs
args_adapter: TypeAdapter[AnyArgs] = TypeAdapter(JobArgs)

KINDS: Final = ("ingest", "train", "embed", "evaluate", "experiment", "import_model", "compose")


class Policy(Word):
    """How the queue treats a kind."""

    lane: Lane
    max_attempts: int
    deadline_s: float
    unit: str


POLICIES: Final[dict[str, Policy]] = {
    "ingest": Policy(lane="bulk", max_attempts=5, deadline_s=24 * 3600, unit="samples"),
    "train": Policy(lane="train", max_attempts=3, deadline_s=30 * 24 * 3600, unit="steps"),
    "embed": Policy(lane="bulk", max_attempts=5, deadline_s=24 * 3600, unit="samples"),
    "evaluate": Policy(lane="bulk", max_attempts=5, deadline_s=24 * 3600, unit="samples"),
    # Repeating one is a matter of minutes, and a claim that fails is a result: there is nothing to try again for.
    "experiment": Policy(lane="train", max_attempts=1, deadline_s=3600, unit="runs"),
    "import_model": Policy(lane="bulk", max_attempts=3, deadline_s=6 * 3600, unit="bytes"),
    "compose": Policy(lane="bulk", max_attempts=5, deadline_s=7 * 24 * 3600, unit="sources"),
}


def cost_of(args: AnyArgs) -> int:
    """Estimate a job's work, for fairness within its lane: thousands of pairs learned, or 1.

    What the kinds of the bulk lane cost depends on data that are not counted yet, or that nobody wants to count here.
    An experiment's is put as thousands of pairs that a small model learns in its time, about 2,000 pairs a second.
    """
    if isinstance(args, ExperimentArgs):
        experiment = EXPERIMENTS[args.experiment]
        seconds = experiment.duration_s * (args.seeds or experiment.seeds) / experiment.seeds
        return max(1, round(2 * seconds * (0.1 if args.quick else 1)))
    if not isinstance(args, TrainArgs):
        return 1
    budget = args.recipe.budget or Budget()
    return max(1, budget.steps * budget.batch_size // 1000)


class Reject(Word):
    """A sample that ingest refused."""

    key: str
    reason: str


class IngestResult(Word):
    """What ingest found; `artifact` is the data set's directory in the store."""

    kind: Literal["ingest"] = "ingest"
    artifact: str
    num_samples: int
    num_rejected: int
    rejects: Annotated[list[Reject], Field(description="the first ones")]
    modalities: Annotated[dict[str, str], Field(description="modality -> medium")]
    splits: Annotated[dict[str, int], Field(description="split -> samples")]
    labels: Annotated[list[str], Field(description="distinct class labels, at most 1,000")]
    statistics: Annotated[
        dict[str, dict[str, float]], Field(description="modality -> figure -> value, with units in the name")
    ]
    digest: str
    num_bytes: int


class TrainResult(Word):
    """A trained model; the queue writes its row in the transaction that ends the job."""

    kind: Literal["train"] = "train"
    artifact: str
    modalities: list[str]
    dimensions: int
    logit_scales: Annotated[
        dict[str, float], Field(description="pair -> scale, pairs named a+b in order of the alphabet")
    ]
    logit_biases: dict[str, float] = Field(
        default_factory=dict[str, float], description="of pairs trained with the sigmoid loss"
    )
    critic: Critic = "cosine"
    metrics: dict[str, float]
    digest: str
    num_bytes: int


class EmbedResult(Word):
    """An embedding set."""

    kind: Literal["embed"] = "embed"
    artifact: str
    model: str
    model_digest: str
    modality: str
    num_vectors: int
    dimensions: int
    num_bytes: int
    digest: Annotated[str, Field(description="of the artifact; empty for sets of earlier versions")] = ""
    dataset: Annotated[str | None, Field(description="null for sets of earlier versions")] = None
    split: Annotated[Literal["train", "holdout", "all"] | None, Field(description="likewise")] = None


class EvaluateResult(Word):
    """A report, `report.json` and `report.html` among the job's files."""

    kind: Literal["evaluate"] = "evaluate"
    artifact: str
    summary: dict[str, float]


class ExperimentResult(Word):
    """A report, `report.json` and `report.html` among the job's files. A claim that fails is a job that succeeded."""

    kind: Literal["experiment"] = "experiment"
    artifact: str
    verdict: Verdict
    summary: Annotated[dict[str, float], Field(description="figure -> its mean over the seeds")]


class ImportModelResult(Word):
    """An imported model; the queue writes its row in the transaction that ends the job."""

    kind: Literal["import_model"] = "import_model"
    artifact: str
    architecture: str
    modalities: list[str]
    dimensions: int
    logit_scales: Annotated[dict[str, float], Field(description="pair -> scale; empty for a model of one modality")]
    logit_biases: Annotated[dict[str, float], Field(description="of pairs trained with the sigmoid loss")]
    critic: Critic
    metrics: dict[str, float]
    digest: str
    num_bytes: int


class ComposeResult(Word):
    """The best targets of every source, `matches.parquet` and `summary.json` among the job's files."""

    kind: Literal["compose"] = "compose"
    artifact: str
    num_sources: int
    num_targets: int
    top_k: int
    summary: Annotated[dict[str, float], Field(description="figure -> its median over the sources, or their share")]
    warnings: list[str]
    num_bytes: int


JobResult = Annotated[
    IngestResult | TrainResult | EmbedResult | EvaluateResult | ExperimentResult | ImportModelResult | ComposeResult,
    Field(discriminator="kind"),
]
AnyResult = (
    IngestResult | TrainResult | EmbedResult | EvaluateResult | ExperimentResult | ImportModelResult | ComposeResult
)
result_adapter: TypeAdapter[AnyResult] = TypeAdapter(JobResult)


def status_of(state: State, *, cancel_requested: bool) -> Status:
    """Translate a row's state into the status that the API shows."""
    if state == "scheduled":
        return "queued"
    if state == "running" and cancel_requested:
        return "cancelling"
    return state
