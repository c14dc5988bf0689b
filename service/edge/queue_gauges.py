"""The queue and its workers, for Prometheus: read from the database now and then, and never in full.

Every query walks a partial index of one state and stops at a limit, so neither finished jobs nor a great backlog make
it slow. At most one reading per process is under way, and a scrape waits for it for two seconds only: a database that
is silent leaves these figures out and says `isthmus_database_up 0`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, final

import sqlalchemy as sa
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.contract.dialects import now
from service.contract.errors import IsthmusError
from service.contract.jobs import POLICIES
from service.contract.tables import job, worker
from service.database import Database

MAX_COUNTED: Final = 100_000
"""Queued jobs per lane that are counted, by the index alone."""
MAX_READ: Final = 10_000
"""Rows that are read: scheduled and running ones, and of queued ones those next in line, for the oldest."""
MAX_WORKERS: Final = 1000
_EVERY_S: Final = 5.0
_WAIT_S: Final = 2.0
_LANES: Final = tuple(sorted({policy.lane for policy in POLICIES.values()}))
_STATES: Final = ("scheduled", "queued", "running")

_in_line = (
    sa.select(job.c.id)
    .where(job.c.state == sa.literal_column("'queued'"), job.c.lane == sa.bindparam("at_lane"))
    .order_by(job.c.fair_seq, job.c.id)  # the order of job_fair
)
_QUEUED: Final = sa.select(sa.func.count()).select_from(_in_line.limit(MAX_COUNTED).subquery())
_next = _in_line.add_columns(job.c.run_at).limit(MAX_READ).subquery()
_QUEUED_SINCE: Final = sa.select(sa.func.min(_next.c.run_at))
_due = (
    sa.select(job.c.lane, job.c.run_at)
    .where(job.c.state == sa.literal_column("'scheduled'"))
    .order_by(job.c.run_at)
    .limit(MAX_READ)
    .subquery()
)
_SCHEDULED: Final = sa.select(_due.c.lane, sa.func.count(), sa.func.min(_due.c.run_at)).group_by(_due.c.lane)
_at_work = (
    sa.select(job.c.lane, job.c.started_at)
    .where(job.c.state == sa.literal_column("'running'"))
    .order_by(job.c.worker_id)
    .limit(MAX_READ)
    .subquery()
)
_RUNNING: Final = sa.select(_at_work.c.lane, sa.func.count(), sa.func.min(_at_work.c.started_at)).group_by(
    _at_work.c.lane
)
_WORKERS: Final = (
    sa.select(worker.c.id, worker.c.lanes, worker.c.draining, worker.c.last_seen)
    .order_by(worker.c.last_seen.desc())
    .limit(MAX_WORKERS)
)
# What a session sees keeps the dead rows of every later update from being removed, so claims grow slower.
_OLDEST_SNAPSHOT: Final = sa.text(
    "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - xact_start)), 0) FROM pg_stat_activity"
    " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    " AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)"
)


@dataclass(frozen=True)
class Reading:
    """The queue at one moment; the keys are (lane, state), ages are seconds."""

    jobs: dict[tuple[str, str], int]
    oldest_age_s: dict[tuple[str, str], float]
    workers: list[tuple[str, str, str, float]]
    """Id, lanes, `live | draining | silent`, and the age of the last heartbeat."""
    snapshot_age_s: float | None
    """None on SQLite."""


def look(conn: sa.Connection, ttl_s: float) -> Reading:
    """Read the queue; a worker without a heartbeat for `ttl_s` is silent."""
    at: datetime = conn.execute(sa.select(now())).scalar_one()
    jobs = {(lane, state): 0 for lane in _LANES for state in _STATES}
    since: dict[tuple[str, str], datetime] = {}
    for lane in _LANES:
        jobs[lane, "queued"] = conn.execute(_QUEUED, {"at_lane": lane}).scalar_one()
        if jobs[lane, "queued"] and (first := conn.execute(_QUEUED_SINCE, {"at_lane": lane}).scalar_one()) is not None:
            since[lane, "queued"] = first
    for state, query in (("scheduled", _SCHEDULED), ("running", _RUNNING)):
        for lane, num, first in conn.execute(query):
            jobs[lane, state], since[lane, state] = num, first
    workers = [
        (worker_id, ",".join(sorted(lanes)), _state(age_s, ttl_s, draining=draining), age_s)
        for worker_id, lanes, draining, last_seen in conn.execute(_WORKERS)
        for age_s in (_age_s(at, last_seen),)
    ]
    is_postgres = conn.dialect.name == "postgresql"
    return Reading(
        jobs=jobs,
        oldest_age_s={key: _age_s(at, since[key]) if key in since else 0.0 for key in jobs},
        workers=workers,
        snapshot_age_s=float(conn.execute(_OLDEST_SNAPSHOT).scalar_one()) if is_postgres else None,
    )


def _age_s(at: datetime, since: datetime) -> float:
    return max(0.0, (at - since).total_seconds())


def _state(age_s: float, ttl_s: float, *, draining: bool) -> str:
    if age_s > ttl_s:
        return "silent"
    return "draining" if draining else "live"


@final
class QueueGauges(Collector):
    """The last reading, as Prometheus wants it."""

    def __init__(self, database: Database, *, ttl_s: float, every_s: float = _EVERY_S, wait_s: float = _WAIT_S) -> None:
        self._database = database
        self._ttl_s = ttl_s
        self._every_s = every_s
        self._wait_s = wait_s
        self._reading: Reading | None = None
        self._read_at = -every_s
        self._task: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Read the database if the last reading is old; what does not answer in time is left out."""
        task = self._task
        if task is None or task.done():
            if time.monotonic() - self._read_at < self._every_s:
                return
            task = self._task = asyncio.create_task(self._read())
        await asyncio.wait({task}, timeout=self._wait_s)
        if task.done():
            task.result()
        else:
            self._reading = None  # it goes on, and the next scrape may find its answer

    async def close(self) -> None:
        """Wait for a reading that is under way.

        Cancelling the task would leave its thread with a connection that nobody closes.
        """
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _read(self) -> None:
        try:
            self._reading = await self._database.read(lambda conn: look(conn, self._ttl_s))
        except IsthmusError:
            self._reading = None
        self._read_at = time.monotonic()

    def describe(self) -> Iterable[Metric]:
        """Describe nothing, so that registering asks no database."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Show the last reading."""
        reading = self._reading
        yield GaugeMetricFamily("isthmus_database_up", "Whether the database answers", value=float(reading is not None))
        if reading is None:
            return
        jobs = GaugeMetricFamily(
            "isthmus_queue_jobs", "Jobs that have not ended, up to a limit", labels=["lane", "state"]
        )
        for key, num in reading.jobs.items():
            jobs.add_metric(key, num)
        yield jobs
        ages = GaugeMetricFamily(
            "isthmus_queue_oldest_age_seconds",
            "Of the oldest job: since it was due, or (running) since its attempt began",
            labels=["lane", "state"],
        )
        for key, age_s in reading.oldest_age_s.items():
            ages.add_metric(key, age_s)
        yield ages
        beats = GaugeMetricFamily(
            "isthmus_worker_heartbeat_age_seconds", "Since a worker's last heartbeat", labels=["worker", "lanes"]
        )
        states: dict[str, int] = {"live": 0, "draining": 0, "silent": 0}
        for worker_id, lanes, state, age_s in reading.workers:
            beats.add_metric((worker_id, lanes), age_s)
            states[state] += 1
        yield beats
        workers = GaugeMetricFamily("isthmus_workers", "Workers that are registered", labels=["state"])
        for state, num in states.items():
            workers.add_metric((state,), num)
        yield workers
        if reading.snapshot_age_s is not None:
            yield GaugeMetricFamily(
                "isthmus_oldest_snapshot_age_seconds",
                "Age of the oldest transaction that holds back the removal of dead rows",
                value=reading.snapshot_age_s,
            )
