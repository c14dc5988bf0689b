"""Which queued job a worker gets, and how it becomes its own: one statement on PostgreSQL, so one round trip.

Jobs of a lane start by priority, then by their virtual start (`queue`), then by age. A claim for the `oldest` leaves
the priority out, so that a stream of urgent jobs does not hold up the others for ever.

A tenant may have a cap on the jobs that it runs at once. Claims that look at the same time would each see room for one
more, so a lane in which somebody has a cap is claimed from by one worker at a time, one job at a time; any other lane
knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from service.contract.dialects import after, now
from service.contract.direct import Direct
from service.contract.jobs import Lane
from service.contract.tables import job, job_event, tenant_queue, worker
from service.contract.transact import read, transact


class Picked(NamedTuple):
    """A job's row, just after it became the worker's."""

    id: int
    public_id: str
    tenant_id: str
    lane: str
    kind: str
    lease_epoch: int
    attempt: int
    max_attempts: int
    deadline_s: int
    request_id: str | None
    args: str
    """As JSON."""
    priority: int
    fair_seq: int


_at_lane = sa.bindparam("at_lane", type_=sa.String)
_me = sa.bindparam("me", type_=sa.String)
_is_capped = sa.exists().where(tenant_queue.c.lane == _at_lane, tenant_queue.c.max_running.is_not(None))
_other = job.alias("other")
FULL: Final = sa.select(tenant_queue.c.tenant_id).where(
    tenant_queue.c.lane == _at_lane,
    tenant_queue.c.max_running.is_not(None),
    tenant_queue.c.max_running
    <= sa.select(sa.func.count())
    .select_from(_other)
    .where(
        _other.c.state == sa.literal_column("'running'"),
        _other.c.lane == tenant_queue.c.lane,
        _other.c.tenant_id == tenant_queue.c.tenant_id,
    )
    .scalar_subquery(),
)


_NUM: Final = sa.bindparam("num", type_=sa.Integer)


def _claim(
    *, oldest: bool, capped: bool, kinds: sa.ColumnElement[bool], num: sa.ColumnElement[int] = _NUM
) -> sa.Update:
    order = (job.c.fair_seq, job.c.id) if oldest else (job.c.priority, job.c.fair_seq, job.c.id)
    # A materialised pick: a plan that joins a limited subquery in a loop could update more rows than the limit.
    pick = (
        sa.select(job.c.id)
        .where(
            job.c.state == sa.literal_column("'queued'"),
            job.c.lane == _at_lane,
            kinds,
            sa.exists().where(
                worker.c.id == _me,
                worker.c.draining.is_(sa.false()),
                worker.c.last_seen > after(sa.bindparam("minus_ttl_s", type_=sa.Double)),
            ),
            job.c.tenant_id.not_in(FULL) if capped else ~_is_capped,
        )
        .order_by(*order)
        .limit(num)
        .with_for_update(of=job, skip_locked=True)
        .cte("pick")
        .prefix_with("MATERIALIZED")
    )
    return (
        sa.update(job)
        .where(job.c.id.in_(sa.select(pick.c.id)))
        .values(
            state=sa.literal_column("'running'"),
            worker_id=_me,
            lease_epoch=job.c.lease_epoch + 1,
            attempt=job.c.attempt + 1,
            started_at=now(),
            deadline_at=after(job.c.deadline_s),
        )
        .returning(
            *(job.c[name] if name != "args" else sa.cast(job.c.args, sa.Text).label("args") for name in Picked._fields)
        )
    )


def _noted(claim: sa.Update, *, oldest: bool) -> sa.Select[Any]:
    claimed = claim.cte("claimed")
    detail = sa.func.jsonb_build_object("attempt", claimed.c.attempt, "worker", _me, type_=JSONB)
    note = sa.insert(job_event).from_select(
        ["job_id", "tenant_id", "epoch", "type", "detail"],
        sa.select(
            claimed.c.id,
            claimed.c.tenant_id,
            claimed.c.lease_epoch,
            sa.literal_column("'started'", sa.String),
            detail,
        ),
    )
    in_line = (claimed.c.fair_seq, claimed.c.id)  # as RETURNING promises no order
    return sa.select(claimed).order_by(*(in_line if oldest else (claimed.c.priority, *in_line))).add_cte(note.cte("n"))


_ANY_KIND: Final = job.c.kind == sa.any_(sa.bindparam("kinds", type_=ARRAY(sa.String)))
_IN_KINDS: Final = job.c.kind.in_(sa.bindparam("kinds", expanding=True))
_FORMS: Final = [(oldest, capped) for oldest in (False, True) for capped in (False, True)]
_CLAIM: Final = {form: _claim(oldest=form[0], capped=form[1], kinds=_IN_KINDS) for form in _FORMS}
_CLAIM_NOTED: Final = {
    form: _noted(_claim(oldest=form[0], capped=form[1], kinds=_ANY_KIND), oldest=form[0]) for form in _FORMS
}
_NOTE: Final = sa.insert(job_event).values(type="started")
_CAPPED: Final = sa.select(_is_capped)
_ONE_BY_ONE: Final = sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("isthmus:" + _at_lane)))


@lru_cache(64)
def _direct(num: int, *, oldest: bool) -> Direct:
    # The number stands in the statement: the plan of a prepared one takes a bound limit for a tenth of all that waits,
    # and so would either read the whole table or be made anew each time.
    claim = _claim(oldest=oldest, capped=False, kinds=_ANY_KIND, num=sa.literal_column(str(num), sa.Integer))
    return Direct(_noted(claim, oldest=oldest))


def pick(
    engine: sa.Engine,
    *,
    worker_id: str,
    lane: Lane,
    kinds: Sequence[str],
    ttl_s: float,
    limit: int,
    oldest: bool,
) -> list[Picked]:
    """Make up to `limit` queued jobs this worker's and return their rows, first in line first."""
    who = {"me": worker_id, "at_lane": lane, "kinds": list(kinds), "minus_ttl_s": -ttl_s}
    if engine.dialect.name == "postgresql":
        rows = _direct(limit, oldest=oldest)(engine, who)
    else:
        rows = transact(engine, lambda conn: _take(conn, (oldest, False), {**who, "num": limit}))
    if not rows and read(engine, lambda conn: conn.scalar(_CAPPED, {"at_lane": lane}), single=True):
        rows = transact(engine, lambda conn: _take_in_turn(conn, oldest, {**who, "num": 1}, limit))
    return [Picked._make(row) for row in rows]


def _take_in_turn(conn: sa.Connection, oldest: bool, params: dict[str, Any], limit: int) -> list[Any]:  # noqa: FBT001
    if conn.dialect.name == "postgresql":
        conn.execute(_ONE_BY_ONE, {"at_lane": params["at_lane"]})
    rows: list[Any] = []
    while len(rows) < limit and (taken := _take(conn, (oldest, True), params)):
        rows += taken
    return rows


def _take(conn: sa.Connection, form: tuple[bool, bool], params: dict[str, Any]) -> list[Any]:
    if conn.dialect.name == "postgresql":
        return list(conn.execute(_CLAIM_NOTED[form], params).all())
    rows = sorted(
        conn.execute(_CLAIM[form], params).all(),
        key=lambda row: (0 if form[0] else row.priority, row.fair_seq, row.id),
    )
    if rows:
        conn.execute(
            _NOTE,
            [
                {
                    "job_id": row.id,
                    "tenant_id": row.tenant_id,
                    "epoch": row.lease_epoch,
                    "detail": {"attempt": row.attempt, "worker": params["me"]},
                }
                for row in rows
            ],
        )
    return rows
