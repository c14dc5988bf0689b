"""What a tenant may take of a lane: its weight against the others, and how many of its jobs may run or wait at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from service.contract.errors import Invalid
from service.contract.jobs import Lane
from service.contract.tables import job, tenant_queue
from service.contract.transact import read, transact

_MAX: Final = 1_000_000
_TENANT: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_unfinished = sa.union_all(
    *(
        sa.select(job.c.tenant_id, job.c.lane, job.c.state).where(job.c.state == sa.literal_column(f"'{state}'"))
        for state in ("scheduled", "queued", "running")  # each has its index; all together have none
    )
).subquery("unfinished")
_is_running = _unfinished.c.state == sa.literal_column("'running'")
_counts = (
    sa.select(
        _unfinished.c.tenant_id,
        _unfinished.c.lane,
        sa.func.count().filter(_is_running).label("running"),
        sa.func.count().filter(~_is_running).label("waiting"),
    )
    .group_by(_unfinished.c.tenant_id, _unfinished.c.lane)
    .subquery("counts")
)
_SHARES: Final = (
    sa.select(
        tenant_queue.c.tenant_id.label("tenant"),
        tenant_queue.c.lane,
        tenant_queue.c.weight,
        tenant_queue.c.max_running,
        tenant_queue.c.max_queued,
        sa.func.coalesce(_counts.c.running, 0).label("running"),
        sa.func.coalesce(_counts.c.waiting, 0).label("waiting"),
    )
    .outerjoin(_counts, sa.and_(_counts.c.tenant_id == tenant_queue.c.tenant_id, _counts.c.lane == tenant_queue.c.lane))
    .order_by(tenant_queue.c.tenant_id, tenant_queue.c.lane)
)


@dataclass(frozen=True)
class Share:
    """A tenant's share of a lane, and what it has there now; None: no cap."""

    tenant: str
    lane: str
    weight: int
    max_running: int | None
    max_queued: int | None
    running: int
    waiting: int


def check_tenant(name: str) -> str:
    """Return a tenant's name.

    Raises Invalid for one that is not made of small letters, digits, `_`, `.` and `-`, 64 at most.
    """
    if _TENANT.fullmatch(name) is None:
        raise Invalid("a tenant is named by at most 64 small letters, digits, '_', '.' and '-'", param="tenant")
    return name


def shares(engine: sa.Engine) -> list[Share]:
    """Return the shares of every tenant that ever had a job or was given a share."""
    return [Share(*row) for row in read(engine, lambda conn: conn.execute(_SHARES).all(), single=True)]


def set_share(
    engine: sa.Engine, *, tenant: str, lane: Lane, weight: int, max_running: int | None, max_queued: int | None
) -> None:
    """Set a tenant's share of a lane: jobs enqueued from now on are ordered by it, claims keep to it at once.

    Two tenants with weights 3 and 1 that both have work waiting get three quarters and one quarter of the lane. What
    runs already is not stopped. Raises Invalid for a number out of range.
    """
    check_tenant(tenant)
    for name, value, least in (("weight", weight, 1), ("max_running", max_running, 0), ("max_queued", max_queued, 0)):
        if value is not None and not least <= value <= _MAX:
            raise Invalid(f"{name} lies between {least} and {_MAX:,}", param=name)
    caps = {"weight": weight, "max_running": max_running, "max_queued": max_queued}
    statement = (
        insert(tenant_queue)
        .values(tenant_id=tenant, lane=lane, **caps)
        .on_conflict_do_update(index_elements=[tenant_queue.c.tenant_id, tenant_queue.c.lane], set_=caps)
    )
    transact(engine, lambda conn: conn.execute(statement), single=True)
