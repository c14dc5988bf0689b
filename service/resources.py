"""What the API shows of rows: one class per resource, and the one place where a row becomes it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, cast

import sqlalchemy as sa
from pydantic import Field

from service.contract.jobs import POLICIES, Reject, Status, status_of
from service.contract.losses import Critic
from service.contract.modality import TokeniserConfig
from service.contract.tables import alias, job, job_progress, job_result, owned
from service.contract.word import Word
from service.edge.paging import Listing


class Progress(Word):
    """How far a job is."""

    done: int
    total: int | None
    unit: str
    eta_s: float | None


class JobFailure(Word):
    """Why a job failed."""

    type: str
    message: str
    code: str | None


class Job(Word):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    kind: str
    status: Status
    name: str | None
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    max_attempts: int
    priority: Annotated[int, Field(description="0 is served first, 9 last")]
    progress: Progress | None
    error: JobFailure | None
    result: dict[str, Any] | None
    args: dict[str, Any]
    metadata: dict[str, str] | None


class JobList(Listing[Job]):
    """Jobs."""


class JobEvent(Word):
    """Something that happened to a job."""

    id: str
    object: Literal["job.event"] = "job.event"
    created_at: datetime
    type: str
    detail: dict[str, Any]


class JobEventList(Listing[JobEvent]):
    """Events of a job."""


class Checkpoint(Word):
    """A checkpoint of a training job; `id` names it as a model."""

    id: str
    object: Literal["job.checkpoint"] = "job.checkpoint"
    step: int
    created_at: datetime
    metrics: dict[str, float]


class CheckpointList(Listing[Checkpoint]):
    """Checkpoints of a job."""


class Series(Word):
    """The values of one metric, by step."""

    steps: list[int]
    values: list[float]


class Metrics(Word):
    """The metrics of a job, by name."""

    object: Literal["job.metrics"] = "job.metrics"
    series: dict[str, Series]


class File(Word):
    """A file of an artifact."""

    id: Annotated[str, Field(description="its path")]
    object: Literal["file"] = "file"
    num_bytes: int
    sha256: str


class FileList(Listing[File]):
    """Files."""


class Dataset(Word):
    """A data set, with what ingest found as soon as it is done."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    status: Literal["ingesting", "ready", "failed"]
    created_at: datetime
    job_id: Annotated[str | None, Field(description="the ingest job")]
    num_samples: int | None
    num_rejected: int | None
    rejects: Annotated[list[Reject] | None, Field(description="the first samples that were refused, with the reason")]
    modalities: Annotated[dict[str, str] | None, Field(description="modality -> medium")]
    splits: dict[str, int] | None
    labels: list[str] | None
    statistics: dict[str, dict[str, float]] | None
    digest: str | None
    num_bytes: int | None


class DatasetList(Listing[Dataset]):
    """Data sets."""


class DatasetCreated(Dataset):
    """A data set that is being ingested, and the job that does it."""

    job: Job


class Sample(Word):
    """A sample as it was ingested."""

    index: int
    key: str
    label: str | None
    split: Literal["train", "holdout"]
    items: Annotated[
        dict[str, str | list[int] | list[list[float]] | None],
        Field(description="modality -> text, data: URI, or tokens; null: too large to preview"),
    ]


class SampleList(Listing[Sample]):
    """Samples of a data set."""


class Model(Word):
    """A model (OpenAI's shape and more)."""

    id: str
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="seconds since 1970")]
    owned_by: str
    aliases: list[str]
    modalities: list[str]
    pairs: Annotated[list[list[str]], Field(description="modalities that were trained together")]
    dimensions: int
    critic: Annotated[
        Critic,
        Field(
            description="how two vectors are compared: cosine (all have unit length), dot, squared_distance "
            "(-1/2 |a - b|^2; these two have vectors of any length)"
        ),
    ]
    logit_scales: Annotated[dict[str, float], Field(description="by pair, a+b")]
    logit_biases: Annotated[dict[str, float], Field(description="by pair; of those trained with the sigmoid loss")]
    metrics: dict[str, float]
    state: Annotated[Literal["ready", "checkpoint"], Field(description="checkpoint: of a job, may be pruned")]
    job_id: str | None
    digest: str
    num_bytes: int | None
    limits: Annotated[dict[str, int] | None, Field(description="modality -> tokens in a sequence; null in lists")]
    tokenisers: Annotated[dict[str, TokeniserConfig] | None, Field(description="by modality; null in lists")]


class ModelList(Listing[Model]):
    """Models."""


class Deleted(Word):
    """What was deleted."""

    id: str
    object: str
    deleted: Literal[True] = True


class EmbeddingSet(Word):
    """Vectors of a data set under a model."""

    id: str
    object: Literal["embedding_set"] = "embedding_set"
    created_at: datetime
    job_id: str
    model: str
    model_digest: str
    dataset: Annotated[str | None, Field(description="whose samples they are; null for sets of earlier versions")]
    split: Annotated[Literal["train", "holdout", "all"] | None, Field(description="likewise")]
    modality: str
    num_vectors: int
    dimensions: int
    num_bytes: int


class EmbeddingSetList(Listing[EmbeddingSet]):
    """Embedding sets."""


class Key(Word):
    """An API key, without its secret."""

    id: str
    object: Literal["key"] = "key"
    name: str
    scopes: list[str]
    requests_per_minute: int | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: Annotated[datetime | None, Field(description="to the minute; null: never")]


class CreatedKey(Word):
    """A new API key; `secret` is shown this once."""

    key: Key
    secret: str


class KeyList(Listing[Key]):
    """API keys."""


def select_jobs(tenant: str) -> sa.Select[Any]:
    """Select a tenant's jobs with their progress and result."""
    return (
        owned(job, tenant)
        .add_columns(job_progress.c.done, job_progress.c.total, job_progress.c.eta_s, job_result.c.body)
        .outerjoin(job_progress, job_progress.c.job_id == job.c.id)
        .outerjoin(job_result, job_result.c.job_id == job.c.id)
    )


def job_of(row: sa.Row[Any]) -> Job:
    """Show a row of `select_jobs`."""
    error = cast("dict[str, Any] | None", row.error)
    return Job(
        id=row.public_id,
        kind=row.kind,
        status=status_of(row.state, cancel_requested=row.cancel_requested_at is not None),
        name=row.name,
        created_at=row.created_at,
        run_at=row.run_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        priority=row.priority,
        progress=progress_of(row.kind, row.done, row.total, row.eta_s),
        error=None
        if error is None
        else JobFailure(type=error["type"], message=error["message"], code=error.get("code")),
        result=row.body,
        args=row.args,
        metadata=row.meta,
    )


def progress_of(kind: str, done: int | None, total: int | None, eta_s: float | None) -> Progress | None:
    """Show a job's progress, if it has reported any."""
    return None if done is None else Progress(done=done, total=total, unit=POLICIES[kind].unit, eta_s=eta_s)


def event_of(row: sa.Row[Any]) -> JobEvent:
    """Show a row of `job_event`."""
    return JobEvent(id=str(row.id), created_at=row.at, type=row.type, detail=row.detail)


def dataset_of(row: sa.Row[Any]) -> Dataset:
    """Show a row of `dataset`."""
    info = cast("dict[str, Any]", row.info or {})
    shown = ("num_samples", "num_rejected", "rejects", "modalities", "splits", "labels", "statistics", "num_bytes")
    return Dataset.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "status": row.state,
            "created_at": row.created_at,
            "job_id": row.job_id,
            "digest": row.digest,
            **{name: info.get(name) for name in shown},
        }
    )


def model_of(row: sa.Row[Any], aliases: list[str]) -> Model:
    """Show a row of `model`."""
    info = cast("dict[str, Any]", row.info)
    return Model(
        id=row.id,
        created=int(row.created_at.timestamp()),
        owned_by=row.tenant_id,
        aliases=aliases,
        modalities=sorted(info["modalities"]),
        pairs=[name.split("+") for name in sorted(info["logit_scales"])],
        dimensions=info["dimensions"],
        critic=info.get("critic", "cosine"),
        logit_scales=info["logit_scales"],
        logit_biases=info.get("logit_biases", {}),
        metrics=info["metrics"],
        state="ready",
        job_id=row.job_id,
        digest=row.digest,
        num_bytes=info["num_bytes"],
        limits=None,
        tokenisers=None,
    )


def aliases_of(conn: sa.Connection, tenant: str, model_ids: list[str]) -> dict[str, list[str]]:
    """Return the aliases of models, sorted."""
    found: dict[str, list[str]] = {model_id: [] for model_id in model_ids}
    rows = conn.execute(owned(alias, tenant).where(alias.c.model_id.in_(model_ids)).order_by(alias.c.name))
    for row in rows:
        found[row.model_id].append(row.name)
    return found


def embedding_set_of(row: sa.Row[Any]) -> EmbeddingSet:
    """Show a row of `embedding_set`."""
    info = cast("dict[str, Any]", row.info)
    shown = ("model", "model_digest", "modality", "num_vectors", "dimensions", "num_bytes")
    later = {name: info.get(name) for name in ("dataset", "split")}
    return EmbeddingSet.model_validate(
        {
            "id": row.id,
            "created_at": row.created_at,
            "job_id": row.job_id,
            **{name: info[name] for name in shown},
            **later,
        }
    )


def key_of(row: sa.Row[Any]) -> Key:
    """Show a row of `api_key`."""
    return Key(
        id=row.id,
        name=row.name,
        scopes=row.scopes,
        requests_per_minute=row.requests_per_minute,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )
