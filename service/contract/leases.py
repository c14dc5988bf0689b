"""Workers and the jobs they hold: register, heartbeat, promote, claim, rescue.

A worker row is one start of one process. A job belongs to the worker whose id it carries for as long as that row is
alive; a running job without a live worker is an orphan, and whichever worker looks first puts it back.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import sqlalchemy as sa
from pydantic import ValidationError

from service.contract import picking, references
from service.contract.dialects import after, now
from service.contract.errors import RequestError
from service.contract.jobs import IngestArgs, Input, Lane, State, TrainArgs, args_adapter
from service.contract.outcomes import fail, give_up
from service.contract.references import Args
from service.contract.tables import checkpoint, job, job_input, worker
from service.contract.transact import read, transact

_log = logging.getLogger(__name__)
_OVERRUN_S: Final = 30.0  # a supervisor kills at the deadline itself; only one that does not is overruled
_UPGRADE_S: Final = 60.0  # until a newer worker may be there
_BATCH: Final = 100
_RUNNING: Final = job.c.state == sa.literal_column("'running'")
_ttl = after(sa.bindparam("minus_ttl_s", type_=sa.Double))

_HEARTBEAT: Final = (
    sa.update(worker).where(worker.c.id == sa.bindparam("worker")).values(last_seen=now()).returning(worker.c.draining)
)
_LEASES: Final = sa.select(
    job.c.id,
    job.c.public_id,
    job.c.lease_epoch,
    job.c.attempt,
    job.c.cancel_requested_at.is_not(None).label("cancel"),
    job.c.request_id,
).where(_RUNNING, job.c.worker_id == sa.bindparam("worker"))
_PROMOTE: Final = (
    sa.update(job)
    .where(
        job.c.id.in_(
            sa.select(job.c.id)
            .where(job.c.state == sa.literal_column("'scheduled'"), job.c.run_at <= now())
            .order_by(job.c.run_at)
            .limit(sa.literal_column("500"))  # a generic plan takes a bound limit for a tenth of the table
            .with_for_update(skip_locked=True)
        )
    )
    .values(state=sa.literal_column("'queued'"))
)
_RESUME: Final = (
    sa.select(checkpoint.c.artifact)
    .where(checkpoint.c.job_id == sa.bindparam("job_id"))
    .order_by(checkpoint.c.step.desc())
)
_KNOWN_INPUTS: Final = sa.select(job_input.c.ref).where(job_input.c.job_id == sa.bindparam("job_id"))
_orphan = (
    sa.select(
        job.c.id,
        job.c.public_id,
        job.c.tenant_id,
        job.c.lease_epoch,
        job.c.attempt,
        job.c.max_attempts,
        job.c.args,
        job.c.worker_id,
        job.c.cancel_requested_at.is_not(None).label("cancel_requested"),
        job.c.request_id,
    )
    .order_by(job.c.worker_id, job.c.id)  # the order of job_running
    .limit(_BATCH)
    .with_for_update(of=job, skip_locked=True)
)
_ORPHANS: Final = _orphan.where(
    _RUNNING,
    sa.or_(
        ~sa.exists().where(worker.c.id == job.c.worker_id, worker.c.last_seen > _ttl),
        job.c.deadline_at < after(sa.literal_column(str(-_OVERRUN_S), sa.Double)),
    ),
)
_ORPHANS_OF: Final = _orphan.where(_RUNNING, job.c.worker_id.in_(sa.bindparam("workers", expanding=True)))
_idle = ~sa.exists().where(_RUNNING, job.c.worker_id == worker.c.id)
_FRESH: Final = sa.select(worker.c.id).where(worker.c.id == sa.bindparam("me"), worker.c.last_seen > _ttl)
_FORGET_STALE: Final = sa.delete(worker).where(worker.c.last_seen < _ttl, _idle)
_FORGET: Final = sa.delete(worker).where(worker.c.id.in_(sa.bindparam("workers", expanding=True)))
_NEIGHBOURS: Final = sa.select(worker.c.id, worker.c.pid).where(
    worker.c.host == sa.bindparam("host"), worker.c.boot == sa.bindparam("boot")
)
_DRAIN: Final = sa.update(worker).where(worker.c.id == sa.bindparam("me")).values(draining=True)


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says about itself; `id` is new for every start."""

    id: str
    lanes: list[str]
    kinds: list[str]
    host: str
    boot: str
    pid: int
    endpoint: str | None
    device: str
    version: str


@dataclass(frozen=True)
class Claim:
    """A lease: the right to run one job until the epoch grows."""

    id: int
    public_id: str
    tenant_id: str
    lane: str
    kind: str
    epoch: int
    attempt: int
    max_attempts: int
    deadline_s: int
    args: Args
    inputs: dict[str, Input]
    """What the job reads, by the name its caller gave it."""
    resume: list[str]
    """Of a train job that ran before: its checkpoints' artifacts, newest first."""
    request_id: str | None = None
    """Of the request that submitted the job."""


@dataclass(frozen=True)
class Lease:
    """A job that the database says this worker runs."""

    id: int
    public_id: str
    epoch: int
    attempt: int
    cancel_requested: bool
    request_id: str | None = None


_Rescued = tuple[sa.Row[*tuple[Any, ...]], State]


@dataclass(frozen=True)
class Heartbeat:
    """Whether the worker is still registered."""

    alive: bool
    draining: bool


def register(engine: sa.Engine, info: WorkerInfo) -> None:
    """Add a worker's row."""
    row = {**info.__dict__, "draining": False}
    transact(engine, lambda conn: conn.execute(sa.insert(worker), row))


def heartbeat(engine: sa.Engine, worker_id: str) -> Heartbeat:
    """Say that the worker lives; `alive` is False when it was declared dead and has to stop its jobs."""
    row = transact(engine, lambda conn: conn.execute(_HEARTBEAT, {"worker": worker_id}).one_or_none(), single=True)
    return Heartbeat(alive=row is not None, draining=row is not None and row.draining)


def leases(engine: sa.Engine, worker_id: str) -> dict[int, Lease]:
    """Return the jobs that this worker holds, by row id; one that it runs and does not find here is lost."""
    rows = read(engine, lambda conn: conn.execute(_LEASES, {"worker": worker_id}).all(), single=True)
    return {
        row.id: Lease(row.id, row.public_id, row.lease_epoch, row.attempt, row.cancel, row.request_id) for row in rows
    }


def about(held: Claim | Lease) -> dict[str, object]:
    """Return the fields that every log line about a job carries."""
    return {
        "job": held.public_id,
        "attempt": held.attempt,
        "epoch": held.epoch,
        "request_id": held.request_id,
    }


def drain(engine: sa.Engine, worker_id: str) -> None:
    """Say that the worker takes no more jobs and requests."""
    transact(engine, lambda conn: conn.execute(_DRAIN, {"me": worker_id}), single=True)


def unregister(engine: sa.Engine, worker_id: str) -> None:
    """Remove a worker's row; what it still holds is an orphan from now on."""
    transact(engine, lambda conn: conn.execute(_FORGET, {"workers": [worker_id]}), single=True)


def promote(engine: sa.Engine) -> int:
    """Queue the scheduled jobs that are due, and return how many."""
    return transact(engine, lambda conn: conn.execute(_PROMOTE).rowcount, single=True)


def claim(
    engine: sa.Engine,
    *,
    worker_id: str,
    lane: Lane,
    kinds: Sequence[str],
    ttl_s: float,
    limit: int = 1,
    oldest: bool = False,
) -> list[Claim]:
    """Take up to `limit` jobs of a lane, first in its order, of the kinds that this worker knows.

    With `oldest` the order leaves the priority out. A worker that is draining, unregistered or silent for longer than
    `ttl_s` gets none. A job whose inputs are gone fails for good here, and the next one is taken in its place; one that
    this version cannot read is put off, since a newer worker may, and fails when its attempts are used up.
    """
    while True:
        rows = picking.pick(
            engine, worker_id=worker_id, lane=lane, kinds=kinds, ttl_s=ttl_s, limit=limit, oldest=oldest
        )
        claims = _open(engine, worker_id, rows)
        if claims or not rows:
            return claims


def rescue(engine: sa.Engine, *, ttl_s: float, by: str | None = None) -> list[tuple[str, State]]:
    """Put back what runs without a live worker or half a minute past its deadline; return public ids and states.

    The attempt counts, so a job that kills its workers ends as failed. Rows of dead workers go once nothing refers to
    them. A worker that names itself with `by` judges nobody when its own last heartbeat is older than half of `ttl_s`:
    what kept it waiting, perhaps for this very transaction, kept the others as well.
    """

    def work(conn: sa.Connection) -> list[_Rescued]:
        if by is not None and conn.execute(_FRESH, {"me": by, "minus_ttl_s": -ttl_s / 2}).one_or_none() is None:
            return []
        rescued = [_rescue(conn, row) for row in conn.execute(_ORPHANS, {"minus_ttl_s": -ttl_s}).all()]
        conn.execute(_FORGET_STALE, {"minus_ttl_s": -ttl_s})
        return rescued

    return _told(transact(engine, work))


def forget(engine: sa.Engine, worker_ids: Sequence[str]) -> list[tuple[str, State]]:
    """Remove workers that are known to be dead and put back what they ran; return public ids and states."""

    def work(conn: sa.Connection) -> list[_Rescued]:
        rows = conn.execute(_ORPHANS_OF, {"workers": list(worker_ids)}).all()
        conn.execute(_FORGET, {"workers": list(worker_ids)})
        return [_rescue(conn, row) for row in rows]

    return _told(transact(engine, work))


def neighbours(engine: sa.Engine, *, host: str, boot: str) -> dict[str, int]:
    """Return the process ids of the workers registered from this boot of this host, by worker id."""
    rows = read(engine, lambda conn: conn.execute(_NEIGHBOURS, {"host": host, "boot": boot}).all())
    return {row.id: row.pid for row in rows}


def _rescue(conn: sa.Connection, row: sa.Row[*tuple[Any, ...]]) -> _Rescued:
    error = {"type": "worker_lost", "message": "the worker that ran the job is gone", "code": None}
    return row, give_up(conn, row, error | {"worker": row.worker_id}, retry=True)


def _told(rescued: list[_Rescued]) -> list[tuple[str, State]]:
    # After the commit: a transaction that runs again says nothing twice.
    for row, state in rescued:
        _log.warning("rescued", extra={"fields": {**_about(row), "state": state, "from_worker": row.worker_id}})
    return [(row.public_id, state) for row, state in rescued]


def _about(row: sa.Row[*tuple[Any, ...]]) -> dict[str, object]:
    return {"job": row.public_id, "attempt": row.attempt, "epoch": row.lease_epoch, "request_id": row.request_id}


def _open(engine: sa.Engine, worker_id: str, rows: Sequence[picking.Picked]) -> list[Claim]:
    # The rows are this worker's already. Should it die before it has read what they refer to, it is as if it had died
    # at work; should only the database go, the next look at the leases puts them back.
    claims: list[Claim] = []
    for row in rows:
        try:
            claims.append(_claim_of(row))
        except ValidationError as error:
            message = f"this version cannot read the job's args: {error.error_count()} errors"
            lease = Lease(row.id, row.public_id, row.lease_epoch, row.attempt, False, row.request_id)  # noqa: FBT003
            _refuse(
                engine, worker_id, lease, {"type": "Invalid", "message": message, "code": "args_unreadable"}, retry=True
            )
    if all(isinstance(found.args, IngestArgs) for found in claims):  # which reads nothing that has a row
        return claims
    opened = transact(engine, lambda conn: [_with_inputs(conn, found) for found in claims])
    kept: list[Claim] = []
    for found, error in opened:
        if error is None:
            kept.append(found)
        else:
            told = {"type": type(error).__name__, "message": error.message, "code": error.code}
            _refuse(engine, worker_id, found, told)
    return kept


def _claim_of(row: picking.Picked) -> Claim:
    return Claim(
        id=row.id,
        public_id=row.public_id,
        tenant_id=row.tenant_id,
        lane=row.lane,
        kind=row.kind,
        epoch=row.lease_epoch,
        attempt=row.attempt,
        max_attempts=row.max_attempts,
        deadline_s=row.deadline_s,
        args=args_adapter.validate_json(row.args),
        inputs={},
        resume=[],
        request_id=row.request_id,
    )


def _with_inputs(conn: sa.Connection, found: Claim) -> tuple[Claim, RequestError | None]:
    resume = conn.execute(_RESUME, {"job_id": found.id}).scalars().all() if isinstance(found.args, TrainArgs) else ()
    try:
        inputs = references.resolve(conn, found.tenant_id, found.args, resumes=bool(resume))
    except RequestError as error:
        return found, error
    # An alias may have moved since the job was enqueued: what is read now must not be deleted either.
    known = set(conn.execute(_KNOWN_INPUTS, {"job_id": found.id}).scalars()) if inputs else set[str]()
    if new := {references.row_of(used) for used in inputs.values()} - known:
        at = {"job_id": found.id, "tenant_id": found.tenant_id}
        conn.execute(sa.insert(job_input), [{**at, "ref": ref} for ref in sorted(new)])
    return replace(found, inputs=inputs, resume=list(resume)), None


def _refuse(
    engine: sa.Engine, worker_id: str, held: Claim | Lease, error: dict[str, Any], *, retry: bool = False
) -> None:
    state = fail(engine, held, worker_id, error, retry=retry, delay_s=_UPGRADE_S)
    fields = {**about(held), "state": state or "lost", "error": error["message"]}
    _log.warning("refused", extra={"fields": fields})
