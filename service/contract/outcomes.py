"""How a running job goes on or ends: every write fenced by the lease, every end in one transaction with its rows.

A worker may write for a job while the row says `running` under its own worker id and the epoch of its claim. Epochs
only grow, so a worker that was declared dead is refused both before and after the job is claimed again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from service.contract import completion
from service.contract.completion import Result
from service.contract.dialects import after, now, storable
from service.contract.jobs import State, TrainArgs
from service.contract.recipe import Budget
from service.contract.tables import checkpoint, dataset, job, job_event, job_progress, job_result, metric
from service.contract.transact import read, transact

if TYPE_CHECKING:
    from service.contract.leases import Claim, Lease

_MAX_DELAY_S: Final = 300.0

_FENCE: Final = (
    job.c.id == sa.bindparam("job_id"),
    job.c.state == sa.literal_column("'running'"),
    job.c.lease_epoch == sa.bindparam("epoch"),
    job.c.worker_id == sa.bindparam("worker"),
)
_held = sa.select(
    job.c.id,
    job.c.tenant_id,
    job.c.lease_epoch,
    job.c.attempt,
    job.c.max_attempts,
    job.c.args,
    job.c.cancel_requested_at.is_not(None).label("cancel_requested"),
).where(*_FENCE)
_HOLD: Final = _held.with_for_update()
_SHARE: Final = _held.with_for_update(read=True)
_ROW: Final = job.c.id == sa.bindparam("job_id")  # of a row that this transaction has locked
_END: Final = (
    sa.update(job)
    .where(_ROW)
    .values(
        state=sa.bindparam("new_state"),
        finished_at=now(),
        worker_id=None,
        deadline_at=None,
        error=sa.bindparam("new_error", type_=job.c.error.type),
    )
)
_LATER: Final = (
    sa.update(job)
    .where(_ROW)
    .values(
        state=sa.literal_column("'scheduled'"),
        run_at=after(sa.bindparam("delay_s", type_=sa.Double)),
        attempt=job.c.attempt - sa.bindparam("unburnt", type_=sa.SmallInteger),
        worker_id=None,
        deadline_at=None,
        error=sa.bindparam("new_error", type_=job.c.error.type),
    )
)
# fair_seq stays, so a released job is first in its lane.
_RELEASE: Final = (
    sa.update(job)
    .where(_ROW)
    .values(state=sa.literal_column("'queued'"), attempt=job.c.attempt - 1, worker_id=None, deadline_at=None)
)
_ENDED_BY: Final = sa.select(job_result.c.epoch).where(job_result.c.job_id == sa.bindparam("job_id"))
_EVENT: Final = sa.insert(job_event)
_PROGRESS: Final = insert(job_progress).on_conflict_do_update(
    index_elements=[job_progress.c.job_id],
    set_={
        "epoch": sa.literal_column("excluded.epoch"),
        "done": sa.literal_column("excluded.done"),
        "total": sa.literal_column("excluded.total"),
        "eta_s": sa.literal_column("excluded.eta_s"),
        "updated_at": now(),
    },
)
_METRIC: Final = insert(metric).on_conflict_do_update(
    index_elements=[metric.c.job_id, metric.c.epoch, metric.c.name, metric.c.step],
    set_={"value": sa.literal_column("excluded.value")},
)
_CHECKPOINT: Final = insert(checkpoint).on_conflict_do_update(
    index_elements=[checkpoint.c.job_id, checkpoint.c.step],
    set_={
        "epoch": sa.literal_column("excluded.epoch"),
        "artifact": sa.literal_column("excluded.artifact"),
        "digest": sa.literal_column("excluded.digest"),
        "metrics": sa.literal_column("excluded.metrics"),
        "created_at": now(),
    },
)
# What an earlier attempt saved beyond the step that this one went on from was passed over: it is damaged or gone.
_FORGET_PASSED_OVER: Final = sa.delete(checkpoint).where(
    checkpoint.c.job_id == sa.bindparam("of_job"),
    checkpoint.c.epoch < sa.bindparam("of_epoch"),
    checkpoint.c.step > sa.bindparam("from_step"),
)
# The trainer removes the files of all but its newest ones; a step that is gone is not found.
_PRUNE_CHECKPOINTS: Final = sa.delete(checkpoint).where(
    checkpoint.c.job_id == sa.bindparam("of_job"),
    checkpoint.c.step.not_in(
        sa.select(checkpoint.c.step)
        .where(checkpoint.c.job_id == sa.bindparam("of_job"))
        .order_by(checkpoint.c.step.desc())
        .limit(sa.bindparam("keep"))
    ),
)
_DATASET: Final = sa.update(dataset).where(
    dataset.c.id == sa.bindparam("dataset"), dataset.c.tenant_id == sa.bindparam("tenant")
)
_DATASET_STATE: Final = _DATASET.values(state=sa.bindparam("new_state"))


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was published: `artifact` is its key, whose `model/` has the layout of a model."""

    step: int
    artifact: str
    digest: str
    metrics: dict[str, float]


@dataclass
class Batch:
    """What a running job reported since it was last written down."""

    progress: tuple[int, int | None, float | None] | None = None
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list[tuple[str, dict[str, Any]]])
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list[tuple[int, dict[str, float]]])
    checkpoints: list[Saved] = field(default_factory=list[Saved])

    def __bool__(self) -> bool:
        """Return whether there is anything to write."""
        return bool(self.progress or self.events or self.metrics or self.checkpoints)


def record(engine: sa.Engine, claim: Claim, worker_id: str, batch: Batch) -> bool:
    """Write what a running job reported, in one transaction; False if the lease is lost.

    Metrics that are not finite numbers are left out: no reader could show them.
    """
    at = {"job_id": claim.id, "tenant_id": claim.tenant_id, "epoch": claim.epoch}
    events = [{**at, "type": kind, "detail": storable(detail)} for kind, detail in batch.events]
    metrics = [
        {**at, "step": step, "name": name, "value": value}
        for step, values in batch.metrics
        for name, value in values.items()
        if math.isfinite(value)
    ]
    checkpoints = [
        {**at, "step": x.step, "artifact": x.artifact, "digest": x.digest, "metrics": storable(x.metrics)}
        for x in batch.checkpoints
    ]

    def work(conn: sa.Connection) -> bool:
        if conn.execute(_SHARE, _fence(claim, worker_id)).one_or_none() is None:
            return False
        if batch.progress is not None:
            done, total, eta_s = batch.progress
            conn.execute(_PROGRESS, {**at, "done": done, "total": total, "eta_s": eta_s})
        for statement, rows in ((_EVENT, events), (_METRIC, metrics), (_CHECKPOINT, checkpoints)):
            if rows:
                conn.execute(statement, rows)
        if checkpoints and isinstance(claim.args, TrainArgs):
            keep = (claim.args.recipe.budget or Budget()).keep_checkpoints
            beyond = {"of_job": claim.id, "of_epoch": claim.epoch, "from_step": min(x.step for x in batch.checkpoints)}
            conn.execute(_FORGET_PASSED_OVER, beyond)
            conn.execute(_PRUNE_CHECKPOINTS, {"of_job": claim.id, "keep": keep})
        return True

    return transact(engine, work)


def finish(engine: sa.Engine, claim: Claim, worker_id: str, result: Result) -> State | None:
    """End a job with its result, and write the row that it made, in one transaction.

    An ingest job makes its data set ready; a train job makes a model (its id is in the artifact's key) and moves its
    alias there; an embed job makes an embedding set. Returns `succeeded`, `cancelled` if somebody asked for that first,
    or None if the lease is lost. Raises TooLarge for a result over 1 MiB.
    """
    return finish_many(engine, worker_id, [(claim, result)])[0]


def finish_many(engine: sa.Engine, worker_id: str, ends: Sequence[tuple[Claim, Result]]) -> list[State | None]:
    """End several jobs as `finish` does, in one transaction; return what became of each.

    A job that was cancelled or lost does not keep the others from ending. To say it again after an answer that was lost
    on its way is no harm: a job that this very claim has ended is `succeeded`. Raises TooLarge for a result over 1 MiB;
    then nothing is written.
    """
    bodies = [completion.encode(result) for _, result in ends]
    done = completion.succeed(engine, worker_id, ends, bodies)
    return [
        "succeeded" if (claim.id, claim.epoch) in done else _not_succeeded(engine, claim, worker_id)
        for claim, _ in ends
    ]


def _not_succeeded(engine: sa.Engine, claim: Claim, worker_id: str) -> State | None:
    state = cancelled(engine, claim, worker_id)
    if state is None and read(engine, lambda conn: conn.scalar(_ENDED_BY, {"job_id": claim.id})) == claim.epoch:
        return "succeeded"
    return state


def fail(
    engine: sa.Engine,
    held: Claim | Lease,
    worker_id: str,
    error: dict[str, Any],
    *,
    retry: bool,
    delay_s: float | None = None,
) -> State | None:
    """End a job's attempt with an error; with `retry` and attempts left it is scheduled again.

    The delay doubles with each attempt up to five minutes, with full jitter. Returns the state, or None if the lease is
    lost.
    """

    def work(conn: sa.Connection) -> State | None:
        row = conn.execute(_HOLD, _fence(held, worker_id)).one_or_none()
        return None if row is None else give_up(conn, row, error, retry=retry, delay_s=delay_s)

    return transact(engine, work)


def cancelled(engine: sa.Engine, claim: Claim, worker_id: str) -> State | None:
    """End a job that was asked to stop and did; None if the lease is lost."""

    def work(conn: sa.Connection) -> State | None:
        row = conn.execute(_HOLD, _fence(claim, worker_id)).one_or_none()
        return None if row is None else end(conn, row, "cancelled", None)

    return transact(engine, work)


def release(engine: sa.Engine, held: Claim | Lease, worker_id: str) -> State | None:
    """Put a job back to the head of its lane because the worker stops; the attempt does not count.

    Returns the state (`cancelled` if somebody asked for that), or None if the lease is lost.
    """

    def work(conn: sa.Connection) -> State | None:
        row = conn.execute(_HOLD, _fence(held, worker_id)).one_or_none()
        if row is None:
            return None
        if row.cancel_requested:
            return end(conn, row, "cancelled", None)
        conn.execute(_RELEASE, {"job_id": row.id})
        add_event(conn, row, "released", {})
        return "queued"

    return transact(engine, work)


def snooze(engine: sa.Engine, claim: Claim, worker_id: str, delay_s: float) -> State | None:
    """Put a job off for a while; the attempt does not count.

    Returns the state (`cancelled` if somebody asked for that), or None if the lease is lost.
    """

    def work(conn: sa.Connection) -> State | None:
        row = conn.execute(_HOLD, _fence(claim, worker_id)).one_or_none()
        if row is None:
            return None
        if row.cancel_requested:
            return end(conn, row, "cancelled", None)
        conn.execute(_LATER, {"job_id": row.id, "delay_s": delay_s, "unburnt": 1, "new_error": None})
        add_event(conn, row, "snoozed", {"delay_s": delay_s})
        return "scheduled"

    return transact(engine, work)


def give_up(
    conn: sa.Connection,
    row: sa.Row[*tuple[Any, ...]],
    error: dict[str, Any],
    *,
    retry: bool,
    delay_s: float | None = None,
) -> State:
    """Decide what becomes of a job whose attempt failed, on a row that this transaction has locked."""
    error = storable(error)
    if row.cancel_requested:
        return end(conn, row, "cancelled", None)
    if not retry or row.attempt >= row.max_attempts:
        return end(conn, row, "failed", error)
    wait_s = backoff_s(row.attempt) if delay_s is None else delay_s
    conn.execute(_LATER, {"job_id": row.id, "delay_s": wait_s, "unburnt": 0, "new_error": error})
    detail = {"attempt": row.attempt, "delay_s": wait_s, "error": _shown(error)}
    add_event(conn, row, "retrying", detail)
    return "scheduled"


def end(
    conn: sa.Connection,
    row: sa.Row[*tuple[Any, ...]],
    state: Literal["failed", "cancelled"],
    error: dict[str, Any] | None,
) -> State:
    """End a job without a result, on a row that this transaction has locked; an ingest job's data set fails with it."""
    conn.execute(_END, {"job_id": row.id, "new_state": state, "new_error": error})
    add_event(conn, row, state, {} if error is None else {"error": _shown(error)})
    settle_dataset(conn, row.tenant_id, row.args, "failed")
    return state


def settle_dataset(conn: sa.Connection, tenant: str, args: dict[str, Any], state: str) -> None:
    """Set the state of the data set that an ingest job was to make; other kinds have none."""
    if args["kind"] == "ingest":
        conn.execute(_DATASET_STATE, {"dataset": args["dataset"], "tenant": tenant, "new_state": state})


def add_event(conn: sa.Connection, row: sa.Row[*tuple[Any, ...]], kind: str, detail: dict[str, Any]) -> None:
    """Append to the history of a job, given its row's `id`, `tenant_id` and `lease_epoch`."""
    event = {"job_id": row.id, "tenant_id": row.tenant_id, "epoch": row.lease_epoch, "type": kind, "detail": detail}
    conn.execute(_EVENT, event)


def backoff_s(attempt: int) -> float:
    """Draw the delay before the next attempt: uniform up to 2^attempt seconds, at most five minutes."""
    return min(_MAX_DELAY_S, 2.0 ** min(attempt, 20)) * random.random()


def _fence(claim: Claim | Lease, worker_id: str) -> dict[str, Any]:
    return {"job_id": claim.id, "epoch": claim.epoch, "worker": worker_id}


def _shown(error: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in error.items() if key != "traceback"}  # that stays on the job
