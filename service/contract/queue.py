"""The queue as its callers see it: enqueue, cancel, retry, prune. `leases` and `outcomes` are the workers' side.

These three are the only writers of `job` and of the tables that hang on it. Statements are built once, and states stand
in them as literals: PostgreSQL's generic plans cannot use a partial index for a bound state.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from service.contract import picking, references, wake
from service.contract.dialects import Instant, after, now
from service.contract.errors import Conflict, Invalid, Malformed, NotFound, TooLarge, TooMany
from service.contract.jobs import POLICIES, State, cost_of
from service.contract.outcomes import add_event, settle_dataset
from service.contract.references import Args
from service.contract.tables import MAX_ARGS_BYTES, idempotency, job, job_input, tenant_queue
from service.contract.transact import transact
from service.contract.word import new_id

_UNIT: Final = 1000  # of virtual time per unit of cost
_QUEUED: Final[sa.ColumnElement[str]] = sa.literal_column("'queued'")
_UNFINISHED: Final = "state IN ('scheduled','queued','running')"
_BATCH: Final = 1000

_FLOOR: Final = sa.select(
    sa.func.coalesce(
        sa.select(job.c.fair_seq)
        .where(
            job.c.state == _QUEUED,
            job.c.lane == sa.bindparam("lane"),
            # What waits for its tenant's cap alone stands still while the lane goes on.
            job.c.tenant_id.not_in(picking.FULL),
        )
        .order_by(job.c.priority, job.c.fair_seq, job.c.id)
        .limit(1)
        .scalar_subquery(),
        sa.select(sa.func.max(tenant_queue.c.vtime))
        .where(tenant_queue.c.lane == sa.bindparam("lane"))
        .scalar_subquery(),
        0,
    )
)
_floor = sa.bindparam("floor", type_=sa.BigInteger)
_work = sa.bindparam("work", type_=sa.BigInteger)
_CHARGE: Final = (
    insert(tenant_queue)
    .values(tenant_id=sa.bindparam("tenant"), lane=sa.bindparam("at_lane"), vtime=_floor + _work)
    .on_conflict_do_update(
        index_elements=[tenant_queue.c.tenant_id, tenant_queue.c.lane],
        set_={
            "vtime": sa.case((tenant_queue.c.vtime > _floor, tenant_queue.c.vtime), else_=_floor)
            + _work // tenant_queue.c.weight
        },
    )
    .returning(tenant_queue.c.vtime, tenant_queue.c.weight, tenant_queue.c.max_queued)
)
_WAITING: Final = sa.select(
    sum(
        (
            sa.select(sa.func.count())
            .select_from(job)
            .where(
                job.c.state == sa.literal_column(f"'{state}'"),  # each has its index; two states together have none
                job.c.tenant_id == sa.bindparam("tenant"),
                job.c.lane == sa.bindparam("lane"),
            )
            .scalar_subquery()
            for state in ("scheduled", "queued")
        ),
        start=sa.literal(0),
    )
)
_SAME: Final = sa.select(job.c.public_id).where(
    job.c.tenant_id == sa.bindparam("tenant"),
    job.c.kind == sa.bindparam("kind"),
    job.c.unique_key == sa.bindparam("unique_key"),
    sa.text(f"job.{_UNFINISHED}"),
)
_INSERT: Final = (
    insert(job)
    .on_conflict_do_nothing(
        index_elements=[job.c.tenant_id, job.c.kind, job.c.unique_key],
        index_where=sa.text(f"unique_key IS NOT NULL AND {_UNFINISHED}"),
    )
    .returning(job.c.id, job.c.tenant_id, job.c.lease_epoch)
)
_OWN: Final = sa.select(job.c.id, job.c.state, job.c.lane).where(
    job.c.tenant_id == sa.bindparam("tenant"), job.c.public_id == sa.bindparam("job")
)
_CANCEL: Final = (
    sa.update(job)
    .where(
        job.c.tenant_id == sa.bindparam("tenant"),
        job.c.public_id == sa.bindparam("job"),
        sa.text(f"job.{_UNFINISHED}"),
    )
    .values(
        state=sa.case((job.c.state == sa.literal_column("'running'"), job.c.state), else_="cancelled"),
        finished_at=sa.case((job.c.state == sa.literal_column("'running'"), None), else_=now()),
        cancel_requested_at=sa.func.coalesce(job.c.cancel_requested_at, now()),
    )
    .returning(job.c.id, job.c.tenant_id, job.c.state, job.c.args, job.c.lease_epoch)
)
_RETRY: Final = (
    sa.update(job)
    .where(
        job.c.tenant_id == sa.bindparam("tenant"),
        job.c.public_id == sa.bindparam("job"),
        sa.text("job.state IN ('failed','cancelled')"),
    )
    .values(
        state=_QUEUED,
        attempt=0,
        fair_seq=sa.bindparam("start"),
        run_at=now(),
        finished_at=None,
        started_at=None,
        cancel_requested_at=None,
        error=None,
    )
    .returning(job.c.id, job.c.tenant_id, job.c.args, job.c.lease_epoch)
)
_before = after(sa.bindparam("minus_age_s", type_=sa.Double))
_reader = job.alias("reader")
_is_read = sa.exists(  # a checkpoint of the job is
    sa.select(job_input.c.ref)
    .join(_reader, _reader.c.id == job_input.c.job_id)
    .where(job_input.c.ref == job.c.public_id, sa.text(f"reader.{_UNFINISHED}"))
    .offset(sa.literal_column("0"))  # keeps PostgreSQL from a join, which would read every unfinished job
    .correlate(job)
)
_PRUNE: Final = sa.delete(job).where(
    job.c.id.in_(
        sa.select(job.c.id)
        .where(job.c.finished_at.is_not(None), job.c.finished_at < _before, ~_is_read)
        .order_by(job.c.finished_at)
        .limit(sa.literal_column(str(_BATCH)))  # a generic plan takes a bound limit for a tenth of the table
        .with_for_update(skip_locked=True)
    )
)
_PRUNE_KEYS: Final = sa.delete(idempotency).where(idempotency.c.created_at < _before)


def enqueue(
    conn: sa.Connection,
    *,
    tenant: str,
    args: Args,
    name: str | None = None,
    priority: int = 5,
    run_at: datetime | None = None,
    unique_key: str | None = None,
    meta: dict[str, Any] | None = None,
    cost: int | None = None,
    request_id: str | None = None,
) -> str:
    """Add a job in the caller's transaction and return its public id.

    What the job reads is looked up and recorded in `job_input`. With a `unique_key` that an unfinished job of the same
    tenant and kind carries, nothing is added and that job's id is returned. `cost` is the work that fairness
    between tenants counts, by default as estimated. Every log line about the job carries its `request_id`. Waiting
    supervisors are woken when the transaction commits.

    Raises NotFound, Conflict or Invalid for an input that cannot be read, Invalid for a time without a zone or a
    priority outside 0..9, TooLarge, and TooMany when the tenant has its limit of jobs waiting.
    """
    body = args.model_dump(mode="json")
    _check(body, meta, priority, run_at)
    inputs = references.resolve(conn, tenant, args)
    lane = POLICIES[args.kind].lane
    same = {"tenant": tenant, "kind": args.kind, "unique_key": unique_key}
    while True:
        if unique_key is not None and (public_id := conn.execute(_SAME, same).scalar_one_or_none()) is not None:
            return public_id
        public_id = new_id("job")
        row = {
            "public_id": public_id,
            "tenant_id": tenant,
            "lane": lane,
            "kind": args.kind,
            "name": name,
            "priority": priority,
            "fair_seq": _start(conn, tenant, lane, cost_of(args) if cost is None else cost),
            "max_attempts": POLICIES[args.kind].max_attempts,
            "deadline_s": int(POLICIES[args.kind].deadline_s),
            "args": body,
            "meta": meta,
            "unique_key": unique_key,
            "request_id": request_id,
        }
        statement = _INSERT.values(**row)
        if run_at is not None:
            due = sa.literal(run_at, Instant())
            statement = statement.values(run_at=due, state=sa.case((due > now(), "scheduled"), else_="queued"))
        added = conn.execute(statement).one_or_none()
        if added is not None:
            break
        # Another transaction took the unique key between the look and the insertion: its job is the answer.
    if refs := sorted({references.row_of(found) for found in inputs.values()}):
        conn.execute(sa.insert(job_input), [{"job_id": added.id, "ref": ref, "tenant_id": tenant} for ref in refs])
    add_event(conn, added, "queued", {})
    wake.hint(conn)
    return public_id


def cancel(conn: sa.Connection, tenant: str, public_id: str) -> State:
    """Cancel a waiting job at once; ask a running one to stop (it stays `running` until it did).

    A job that was asked to stop never succeeds. Raises NotFound, or Malformed (`job_already_finished`).
    """
    row = conn.execute(_CANCEL, {"tenant": tenant, "job": public_id}).one_or_none()
    if row is None:
        found = _find(conn, tenant, public_id)
        raise Malformed(f"the job has already {_ENDED[found.state]}", code="job_already_finished")
    if row.state == "cancelled":
        add_event(conn, row, "cancelled", {})
        settle_dataset(conn, tenant, row.args, "failed")
    else:
        add_event(conn, row, "cancelling", {})
        wake.hint(conn)
    return row.state


def retry(conn: sa.Connection, tenant: str, public_id: str) -> State:
    """Queue a failed or cancelled job again with all its attempts; a train job goes on from its last checkpoint.

    Raises NotFound, Malformed (`job_not_retryable`), or Conflict if another job took its unique key.
    """
    found = _find(conn, tenant, public_id)
    refusal = Malformed("only a failed or cancelled job can be retried", code="job_not_retryable")
    if found.state not in ("failed", "cancelled"):
        raise refusal
    start = _start(conn, tenant, found.lane, 1)
    try:
        row = conn.execute(_RETRY, {"tenant": tenant, "job": public_id, "start": start}).one_or_none()
    except IntegrityError as error:
        raise Conflict("an unfinished job has the same unique key") from error
    if row is None:
        raise refusal
    add_event(conn, row, "queued", {"retry": True})
    settle_dataset(conn, tenant, row.args, "ingesting")
    wake.hint(conn)
    return "queued"


def prune(engine: sa.Engine, *, older_than_s: float) -> int:
    """Delete jobs that finished before then, with all that hangs on them, and return how many.

    One whose checkpoint an unfinished job reads stays. Deletes a thousand at a time, so that no lock is held for long.
    """
    total = 0
    while True:
        num = transact(engine, lambda conn: conn.execute(_PRUNE, {"minus_age_s": -older_than_s}).rowcount)
        total += num
        if num < _BATCH:
            return total


def prune_idempotency(engine: sa.Engine, *, older_than_s: float = 86_400.0) -> int:
    """Delete idempotency keys older than a day, and return how many."""
    return transact(engine, lambda conn: conn.execute(_PRUNE_KEYS, {"minus_age_s": -older_than_s}).rowcount)


_ENDED: Final = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}


def _find(conn: sa.Connection, tenant: str, public_id: str) -> sa.Row[*tuple[Any, ...]]:
    found = conn.execute(_OWN, {"tenant": tenant, "job": public_id}).one_or_none()
    if found is None:
        raise NotFound(f"there is no job {public_id}", code="job_not_found")
    return found


def _check(body: dict[str, Any], meta: dict[str, Any] | None, priority: int, run_at: datetime | None) -> None:
    for what, value in (("args", body), ("metadata", meta)):
        num_bytes = len(json.dumps(value).encode())
        if num_bytes > MAX_ARGS_BYTES:
            raise TooLarge(f"{what} take {num_bytes:,} bytes of at most {MAX_ARGS_BYTES:,}", param=what)
    if not 0 <= priority <= 9:
        raise Invalid("the priority lies between 0 and 9", param="priority")
    if run_at is not None and run_at.tzinfo is None:
        raise Invalid("the time needs a time zone", param="run_at")


def _start(conn: sa.Connection, tenant: str, lane: str, cost: int) -> int:
    # Start-time fair queueing: a tenant's next job starts, in virtual time, where its last one ends, but never before
    # the job at the head of the lane; so neither a backlog nor an idle past is held against anybody.
    floor = conn.execute(_FLOOR, {"lane": lane, "at_lane": lane}).scalar_one()
    work = cost * _UNIT
    charge = {"tenant": tenant, "at_lane": lane, "floor": floor, "work": work}
    row = conn.execute(_CHARGE, charge).one()
    if row.max_queued is not None:
        waiting = conn.execute(_WAITING, {"tenant": tenant, "lane": lane}).scalar_one()
        if waiting >= row.max_queued:
            raise TooMany(f"{waiting:,} jobs wait already, of at most {row.max_queued:,}", code="too_many_jobs")
    return row.vtime - work // row.weight
