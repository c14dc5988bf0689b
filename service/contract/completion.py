"""The success of jobs: state, result, event and the rows they made, fenced, all at once or not at all.

PostgreSQL does it in one statement, so that a job costs one round trip and one commit, and 32 cost no more; SQLite,
whose statements are function calls, does it row by row in one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, assert_never, cast

import sqlalchemy as sa
from pydantic_core import PydanticSerializationError
from sqlalchemy.dialects.postgresql import JSONB, insert

from service.contract.dialects import now, storable
from service.contract.direct import Direct
from service.contract.errors import TooLarge
from service.contract.jobs import (
    ComposeResult,
    EmbedResult,
    EvaluateResult,
    ExperimentResult,
    ImportModelArgs,
    ImportModelResult,
    IngestArgs,
    IngestResult,
    TrainArgs,
    TrainResult,
)
from service.contract.tables import alias, dataset, embedding_set, job, job_event, job_result, model
from service.contract.transact import transact

if TYPE_CHECKING:
    from service.contract.leases import Claim

Result = (
    IngestResult | TrainResult | EmbedResult | EvaluateResult | ExperimentResult | ImportModelResult | ComposeResult
)
MAX_RESULT_BYTES: Final = 1 << 20

_RUNNING: Final = job.c.state == sa.literal_column("'running'")
_DONE: Final[dict[Any, Any]] = {
    job.c.state: sa.literal_column("'succeeded'"),
    job.c.finished_at: now(),
    job.c.worker_id: None,
    job.c.deadline_at: None,
    job.c.error: sa.null(),
}
_SUCCEEDED: Final = sa.literal_column("'succeeded'", sa.String)
_SUCCEED: Final = (
    sa.update(job)
    .where(
        job.c.id == sa.bindparam("job_id"),
        _RUNNING,
        job.c.lease_epoch == sa.bindparam("epoch"),
        job.c.worker_id == sa.bindparam("worker"),
        job.c.cancel_requested_at.is_(None),
    )
    .values(_DONE)
    .returning(job.c.id)
)
_ends = (
    sa.func.jsonb_to_recordset(sa.cast(sa.bindparam("ends", type_=sa.Text), JSONB))
    .table_valued(
        sa.column("id", sa.BigInteger),
        sa.column("epoch", sa.BigInteger),
        sa.column("body", JSONB),
        sa.column("dataset", sa.Text),
        name="ends",
    )
    .render_derived(with_types=True)
)
_done = (
    sa.update(job)
    .where(
        job.c.id == _ends.c.id,
        _RUNNING,
        job.c.lease_epoch == _ends.c.epoch,
        job.c.worker_id == sa.bindparam("worker"),
        job.c.cancel_requested_at.is_(None),
    )
    .values(_DONE)
    .returning(job.c.id, job.c.tenant_id, job.c.lease_epoch, _ends.c.body, _ends.c.dataset)
    .cte("done")
)
_at = (_done.c.id, _done.c.tenant_id, _done.c.lease_epoch)
_SUCCEED_TOGETHER: Final = sa.select(_done.c.id, _done.c.lease_epoch).add_cte(
    sa.insert(job_result)
    .from_select(["job_id", "tenant_id", "epoch", "body"], sa.select(*_at, _done.c.body))
    .cte("kept"),
    sa.insert(job_event)
    .from_select(
        ["job_id", "tenant_id", "epoch", "type", "detail"],
        sa.select(*_at, _SUCCEEDED, sa.literal_column("'{}'::jsonb", JSONB)),
    )
    .cte("noted"),
    sa.update(dataset)
    .where(dataset.c.id == _done.c.dataset, dataset.c.tenant_id == _done.c.tenant_id)
    .values(
        state=sa.literal_column("'ready'"),
        artifact=_done.c.body["artifact"].astext,
        digest=_done.c.body["digest"].astext,
        info=_done.c.body,
    )
    .cte("ready"),
)
_SUCCEED_DIRECT: Final = Direct(_SUCCEED_TOGETHER)
_KEEP: Final = sa.insert(job_result)
_NOTE: Final = sa.insert(job_event).values(type="succeeded", detail={})
_READY: Final = (
    sa.update(dataset)
    .where(dataset.c.id == sa.bindparam("dataset"), dataset.c.tenant_id == sa.bindparam("tenant"))
    .values(state="ready", artifact=sa.bindparam("at"), digest=sa.bindparam("of"), info=sa.bindparam("body"))
)
_ALIAS: Final = insert(alias).on_conflict_do_update(
    index_elements=[alias.c.tenant_id, alias.c.name], set_={"model_id": sa.literal_column("excluded.model_id")}
)


def encode(result: Result) -> str:
    """Return a result as the JSON that its row keeps.

    Raises TooLarge for more than 1 MiB.
    """
    try:
        body = result.model_dump_json()
        is_storable = "\\u0000" not in body
    except PydanticSerializationError:  # a lone surrogate
        body, is_storable = "", False
    if not is_storable:
        body = json.dumps(storable(result.model_dump(mode="python")))
    if len(body) > MAX_RESULT_BYTES:
        raise TooLarge(f"the result takes {len(body):,} bytes of at most {MAX_RESULT_BYTES:,}")
    return body


def succeed(
    engine: sa.Engine, worker_id: str, ends: Sequence[tuple[Claim, Result]], bodies: Sequence[str]
) -> set[tuple[int, int]]:
    """End the jobs that are still held and that nobody cancelled; return their row ids and epochs.

    A worker may have lost a job and claimed it again: of its two claims one ends it.
    """
    if engine.dialect.name == "postgresql" and not any(_makes_a_row(result) for _, result in ends):
        return set(cast("list[tuple[int, int]]", _SUCCEED_DIRECT(engine, _together(worker_id, ends, bodies))))

    def work(conn: sa.Connection) -> set[tuple[int, int]]:
        if conn.dialect.name == "postgresql":
            rows = conn.execute(_SUCCEED_TOGETHER, _together(worker_id, ends, bodies))
            done = {(row.id, row.lease_epoch) for row in rows}
        else:
            done = _succeed_one_by_one(conn, worker_id, ends, bodies)
        for (claim, result), body in zip(ends, bodies, strict=True):
            if (claim.id, claim.epoch) in done:
                _write_product(conn, claim, result, body)
        return done

    return transact(engine, work)


def _together(worker_id: str, ends: Sequence[tuple[Claim, Result]], bodies: Sequence[str]) -> dict[str, str]:
    rows = ",".join(
        f'{{"id":{claim.id},"epoch":{claim.epoch},"body":{body},"dataset":{json.dumps(_dataset_of(claim))}}}'
        for (claim, _), body in zip(ends, bodies, strict=True)
    )
    return {"ends": f"[{rows}]", "worker": worker_id}


def _succeed_one_by_one(
    conn: sa.Connection, worker_id: str, ends: Sequence[tuple[Claim, Result]], bodies: Sequence[str]
) -> set[tuple[int, int]]:
    done: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for (claim, _), text in zip(ends, bodies, strict=True):
        held = {"job_id": claim.id, "epoch": claim.epoch, "worker": worker_id}
        if conn.execute(_SUCCEED, held).one_or_none() is None:
            continue
        body = json.loads(text)
        done.append({"job_id": claim.id, "tenant_id": claim.tenant_id, "epoch": claim.epoch})
        results.append({**done[-1], "body": body})
        if (name := _dataset_of(claim)) is not None:
            ready = {"at": body["artifact"], "of": body["digest"], "body": body}
            conn.execute(_READY, {**ready, "dataset": name, "tenant": claim.tenant_id})
    if done:
        conn.execute(_KEEP, results)
        conn.execute(_NOTE, done)
    return {(row["job_id"], row["epoch"]) for row in done}


def _dataset_of(claim: Claim) -> str | None:
    return claim.args.dataset if isinstance(claim.args, IngestArgs) else None


def _makes_a_row(result: Result) -> bool:
    return isinstance(result, TrainResult | EmbedResult | ImportModelResult)


def _write_product(conn: sa.Connection, claim: Claim, result: Result, body: str) -> None:
    match result:
        case TrainResult() | EmbedResult() | ImportModelResult():
            made = {
                "id": result.artifact.split("/")[1],  # models/<id>/<epoch>
                "tenant_id": claim.tenant_id,
                "job_id": claim.public_id,
                "artifact": result.artifact,
                "info": json.loads(body),
            }
            if isinstance(result, EmbedResult):
                conn.execute(sa.insert(embedding_set), made)
                return
            conn.execute(sa.insert(model), {**made, "digest": result.digest})
            if isinstance(claim.args, TrainArgs | ImportModelArgs) and claim.args.name is not None:
                at = {"tenant_id": claim.tenant_id, "name": claim.args.name}
                conn.execute(_ALIAS, {**at, "model_id": made["id"]})
        case IngestResult() | EvaluateResult() | ExperimentResult() | ComposeResult():
            pass  # a data set's row is there from its creation; a report is a file of its job
        case _:
            assert_never(result)
