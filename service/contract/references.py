"""What a job or request reads: the names a caller gives, resolved to artifacts of their own tenant.

A model is named by its id, by an alias, or as `job_x@latest` and `job_x@<step>` (a checkpoint, which is a model).
"""

from __future__ import annotations

from typing import Final, Protocol, assert_never

import sqlalchemy as sa

from service.contract.errors import Conflict, Invalid, NotFound, RequestError
from service.contract.jobs import (
    ComposeArgs,
    EmbedArgs,
    EvaluateArgs,
    ExperimentArgs,
    ImportModelArgs,
    IngestArgs,
    Input,
    SamplesRef,
    TrainArgs,
)
from service.contract.joints import joints_of
from service.contract.operations import EmbeddingSetRef
from service.contract.tables import alias, checkpoint, dataset, embedding_set, job, job_input, model

Args = IngestArgs | TrainArgs | EmbedArgs | EvaluateArgs | ExperimentArgs | ImportModelArgs | ComposeArgs


_DATASET: Final = sa.select(dataset.c.id, dataset.c.state, dataset.c.artifact, dataset.c.digest).where(
    dataset.c.tenant_id == sa.bindparam("tenant"), dataset.c.id == sa.bindparam("ref"), dataset.c.deleted_at.is_(None)
)
_MODEL: Final = sa.select(model.c.id, model.c.artifact, model.c.digest).where(
    model.c.tenant_id == sa.bindparam("tenant"), model.c.id == sa.bindparam("ref"), model.c.deleted_at.is_(None)
)
_SET: Final = sa.select(embedding_set.c.id, embedding_set.c.artifact, embedding_set.c.info).where(
    embedding_set.c.tenant_id == sa.bindparam("tenant"),
    embedding_set.c.id == sa.bindparam("ref"),
    embedding_set.c.deleted_at.is_(None),
)
_ALIAS: Final = (
    sa.select(model.c.id, model.c.artifact, model.c.digest)
    .join(alias, alias.c.model_id == model.c.id)
    .where(
        alias.c.tenant_id == sa.bindparam("tenant"),
        alias.c.name == sa.bindparam("ref"),
        model.c.tenant_id == sa.bindparam("tenant"),
        model.c.deleted_at.is_(None),
    )
)
# Whoever records what a job reads keeps the rows from being deleted until that is committed. SQLite has one writer.
_DATASET_HELD: Final = _DATASET.with_for_update(read=True, of=dataset)
_MODEL_HELD: Final = _MODEL.with_for_update(read=True, of=model)
_SET_HELD: Final = _SET.with_for_update(read=True, of=embedding_set)
_ALIAS_HELD: Final = _ALIAS.with_for_update(read=True, of=model)
_CHECKPOINTS: Final = (
    sa.select(checkpoint.c.step, checkpoint.c.artifact, checkpoint.c.digest)
    .join(job, job.c.id == checkpoint.c.job_id)
    .where(job.c.tenant_id == sa.bindparam("tenant"), job.c.public_id == sa.bindparam("job"))
)
_LATEST: Final = _CHECKPOINTS.order_by(checkpoint.c.step.desc()).limit(1)
_STEP: Final = _CHECKPOINTS.where(checkpoint.c.step == sa.bindparam("step"))


def resolve_dataset(conn: sa.Connection, tenant: str, ref: str, *, hold: bool = False) -> Input:
    """Find a data set that is ready to be read; `hold` keeps it from being deleted until this transaction ends.

    Raises NotFound, Conflict (`dataset_not_ready`) while it is ingested, or Invalid (`dataset_failed`).
    """
    row = conn.execute(_DATASET_HELD if hold else _DATASET, {"tenant": tenant, "ref": ref}).one_or_none()
    if row is None:
        raise NotFound(f"there is no data set {ref}", code="dataset_not_found")
    if row.state == "ingesting":
        raise Conflict(f"data set {ref} is still being ingested", code="dataset_not_ready")
    if row.state != "ready":
        raise Invalid(f"data set {ref} could not be ingested", code="dataset_failed")
    return Input(artifact=row.artifact, digest=row.digest, id=row.id, kind="dataset")


def resolve_model(conn: sa.Connection, tenant: str, ref: str, *, hold: bool = False) -> Input:
    """Find a model by id, alias, `job_x@latest` or `job_x@<step>`; `hold` as for data sets.

    Raises NotFound.
    """
    missing = NotFound(f"there is no model {ref}", code="model_not_found")
    job_id, at, step = ref.partition("@")
    if at:
        row = None
        if step == "latest":
            row = conn.execute(_LATEST, {"tenant": tenant, "job": job_id}).one_or_none()
        elif step.isascii() and step.isdigit() and len(step) <= 18:
            row = conn.execute(_STEP, {"tenant": tenant, "job": job_id, "step": int(step)}).one_or_none()
        if row is None:
            raise missing
        return Input(artifact=row.artifact, digest=row.digest, id=f"{job_id}@{row.step}", kind="model")
    named = {"tenant": tenant, "ref": ref}
    row = conn.execute(_MODEL_HELD if hold else _MODEL, named).one_or_none()
    row = row or conn.execute(_ALIAS_HELD if hold else _ALIAS, named).one_or_none()
    if row is None:
        raise missing
    return Input(artifact=row.artifact, digest=row.digest, id=row.id, kind="model")


def resolve_set(conn: sa.Connection, tenant: str, ref: str, *, hold: bool = False) -> Input:
    """Find an embedding set; `hold` as for data sets.

    Raises NotFound.
    """
    row = conn.execute(_SET_HELD if hold else _SET, {"tenant": tenant, "ref": ref}).one_or_none()
    if row is None:
        raise NotFound(f"there is no embedding set {ref}", code="embedding_set_not_found")
    return Input(artifact=row.artifact, digest=row.info.get("digest", ""), id=row.id, kind="embeddings")


def resolve(conn: sa.Connection, tenant: str, args: Args, *, resumes: bool = False) -> dict[str, Input]:
    """Find and hold everything that a job reads, by the name its caller gave it.

    A train job that `resumes` from a checkpoint of its own has what it started from in there: a model that is gone
    meanwhile, as a checkpoint or an alias can be, is left out.

    Raises NotFound, Conflict or Invalid, naming what cannot be read.
    """
    found: dict[str, Input] = {}
    for place, ref in _models_of(args):
        if ref not in found:
            try:
                found[ref] = _at(place, resolve_model, conn, tenant, ref)
            except NotFound:
                if not (resumes and isinstance(args, TrainArgs)):
                    raise
    datasets: dict[str, Input] = {}
    for place, ref in _datasets_of(args):
        if ref not in datasets:
            datasets[ref] = _at(place, resolve_dataset, conn, tenant, ref)
    sets: dict[str, Input] = {}
    for place, ref in _sets_of(args):
        if ref not in sets:
            sets[ref] = _at(place, resolve_set, conn, tenant, ref)
    return found | datasets | sets


def _models_of(args: Args) -> list[tuple[str, str]]:
    match args:
        case IngestArgs() | ExperimentArgs() | ImportModelArgs():
            return []
        case TrainArgs():
            return [
                (f"recipe.towers.{name}.init_from.model", tower.init_from.model)
                for name, tower in args.recipe.towers.items()
                if tower.init_from is not None
            ]
        case EmbedArgs() | EvaluateArgs():
            return [("model", args.model)]
        case ComposeArgs():
            return [(f"legs[{index}].model", leg.model) for index, leg in enumerate(args.legs or [])]
        case _:
            assert_never(args)


def _datasets_of(args: Args) -> list[tuple[str, str]]:
    match args:
        case IngestArgs() | ExperimentArgs() | ImportModelArgs():
            return []
        case TrainArgs():
            return [(f"recipe.pairs[{index}].dataset", pair.dataset) for index, pair in enumerate(args.recipe.pairs)]
        case EmbedArgs():
            return [("dataset", args.dataset)]
        case ComposeArgs():
            sides = {"source": args.source, "target": args.target}
            return [(f"{at}.dataset", side.dataset) for at, side in sides.items() if isinstance(side, SamplesRef)]
        case EvaluateArgs():
            return [(f"datasets[{index}]", ref) for index, ref in enumerate(args.datasets)]
        case _:
            assert_never(args)


def _sets_of(args: Args) -> list[tuple[str, str]]:
    if not isinstance(args, ComposeArgs):
        return []
    given = {"source": args.source, "target": args.target}
    for asked in joints_of(args.through, args.bridge_weights, max(1, len(args.legs or []) - 1)):
        is_list = isinstance(asked.through, list)
        given |= {f"{asked.param}[{at}]" if is_list else asked.param: ref for at, ref in enumerate(asked.sets)}
    return [(f"{at}.embeddings", each.embeddings) for at, each in given.items() if isinstance(each, EmbeddingSetRef)]


class _Resolver(Protocol):
    def __call__(self, conn: sa.Connection, tenant: str, ref: str, *, hold: bool) -> Input: ...


def _at(place: str, resolver: _Resolver, conn: sa.Connection, tenant: str, ref: str) -> Input:
    try:
        return resolver(conn, tenant, ref, hold=True)
    except RequestError as error:
        raise error.at(place) from None


def row_of(found: Input) -> str:
    """Return the id that `job_input` keeps: the row's, or the job's whose checkpoint is read."""
    return found["id"].partition("@")[0]


def is_needed(conn: sa.Connection, tenant: str, row_id: str, *, maker: str | None = None) -> bool:
    """Tell whether a job that has not ended reads a data set or model, or is its `maker` (a public id)."""
    needs = job.c.id.in_(sa.select(job_input.c.job_id).where(job_input.c.ref == row_id))
    if maker is not None:
        needs |= job.c.public_id == maker
    unfinished = sa.text("job.state IN ('scheduled','queued','running')")
    return (
        conn.execute(sa.select(job.c.id).where(job.c.tenant_id == tenant, unfinished, needs).limit(1)).first()
        is not None
    )
