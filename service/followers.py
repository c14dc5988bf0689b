"""Following jobs: one poll of the database per process feeds every open event stream.

A stream starts with what happened before (or after `Last-Event-ID`), goes on with events, progress, metrics and changes
of status as they are seen, and ends with `done`. Only events of the job's history carry ids: progress and metrics are
readings, and a reader that comes back gets the present ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import sqlalchemy as sa
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from service.contract.errors import IsthmusError
from service.contract.tables import job, job_event, metric
from service.database import Database
from service.resources import Job, Progress, event_of, job_of, select_jobs

log = logging.getLogger(__name__)

POLL_S: Final = 0.5
KEEP_ALIVE_S: Final = 15.0
MAX_EVENTS: Final = 500
MAX_METRICS: Final = 2000
FINAL: Final = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(eq=False)
class _Follower:
    tenant: str
    job_id: int
    last_event: int
    last_step: int | None = None  # nothing was seen yet: begin with the present step
    status: str | None = None
    progress: Progress | None = None
    queue: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue[bytes | None])


@dataclass(frozen=True)
class _Seen:
    job: Job | None
    events: Sequence[sa.Row[*tuple[Any, ...]]]
    metrics: Sequence[sa.Row[*tuple[Any, ...]]]
    begin: int  # whoever saw no metric yet begins after this step
    complete: bool


@final
class Followers:
    """The open event streams of this process."""

    def __init__(self, database: Database, *, poll_s: float = POLL_S) -> None:
        self._database = database
        self._poll_s = poll_s
        self._followers: set[_Follower] = set()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    async def follow(self, tenant: str, job_id: int, last_event: int) -> AsyncGenerator[bytes]:
        """Yield server-sent events of a job until it has ended or the process stops."""
        follower = _Follower(tenant, job_id, last_event)
        self._followers.add(follower)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll())
        try:
            while not self._stopping:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        event = await follower.queue.get()
                except TimeoutError:
                    event = KEEPALIVE_COMMENT
                if event is None:
                    return
                yield event
        finally:
            self._followers.discard(follower)

    def stop(self) -> None:
        """End every stream; their readers come back to another process, or to the next one."""
        self._stopping = True
        for follower in self._followers:
            follower.queue.put_nowait(None)

    async def close(self) -> None:
        """End every stream and the polling."""
        self.stop()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _poll(self) -> None:
        try:
            await self._keep_telling()
        finally:  # after a bug too, nobody is left waiting for news that will not come
            for follower in self._followers:
                follower.queue.put_nowait(None)

    async def _keep_telling(self) -> None:
        while self._followers and not self._stopping:
            by_job: dict[tuple[str, int], list[_Follower]] = {}
            for follower in self._followers:
                by_job.setdefault((follower.tenant, follower.job_id), []).append(follower)
            try:
                found = await self._database.read(
                    lambda conn, by_job=by_job: [_look(conn, *key, followers) for key, followers in by_job.items()]
                )
            except IsthmusError as error:
                log.warning("event streams wait: %s", error.message)  # they stay open while the database is away
            else:
                for followers, seen in zip(by_job.values(), found, strict=True):
                    for follower in followers:
                        _tell(follower, seen)
            await asyncio.sleep(self._poll_s)


def _look(conn: sa.Connection, tenant: str, job_id: int, followers: list[_Follower]) -> _Seen:
    # The job first: if it has ended, the events that are read after it are all there will be.
    row = conn.execute(select_jobs(tenant).where(job.c.id == job_id)).first()
    if row is None:
        return _Seen(None, [], [], begin=-1, complete=True)
    last_event = min(follower.last_event for follower in followers)
    events = list(conn.execute(_EVENTS, {"job": job_id, "last": last_event}))
    begin = -1
    if any(follower.last_step is None for follower in followers):
        begin = (conn.execute(_LAST_STEP, {"job": job_id}).scalar() or 0) - 1
    last_step = min(begin if follower.last_step is None else follower.last_step for follower in followers)
    # The values of a step are written in one transaction: only the limit can cut one in two.
    metrics = list(conn.execute(_METRICS, {"job": job_id, "last": last_step}))
    complete = len(events) < MAX_EVENTS and len(metrics) < MAX_METRICS
    if len(metrics) == MAX_METRICS:
        metrics = [each for each in metrics if each.step != metrics[-1].step]
    return _Seen(job_of(row), events, metrics, begin, complete)


def _tell(follower: _Follower, seen: _Seen) -> None:
    put = follower.queue.put_nowait
    if seen.job is None:
        put(None)  # the job was pruned
        return
    for row in seen.events:
        if row.id > follower.last_event:
            follower.last_event = row.id
            put(format_sse_event(event="event", id=str(row.id), data_str=event_of(row).model_dump_json()))
    if seen.job.status != follower.status:
        follower.status = seen.job.status
        put(_event("state", {"status": seen.job.status}))
    if seen.job.progress is not None and seen.job.progress != follower.progress:
        follower.progress = seen.job.progress
        put(_event("progress", seen.job.progress.model_dump()))
    if follower.last_step is None:
        follower.last_step = seen.begin
    values: dict[int, dict[str, float]] = {}
    for row in seen.metrics:
        if row.step > follower.last_step:
            values.setdefault(row.step, {})[row.name] = row.value  # the highest epoch comes last
    for step, named in values.items():
        follower.last_step = step
        put(_event("metric", {"step": step, "values": named}))
    if seen.complete and seen.job.status in FINAL:
        put(format_sse_event(event="done", data_str=seen.job.model_dump_json()))
        put(None)


def _event(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data))


_EVENTS: Final = (
    sa.select(job_event)
    .where(job_event.c.job_id == sa.bindparam("job"), job_event.c.id > sa.bindparam("last"))
    .order_by(job_event.c.id)
    .limit(MAX_EVENTS)
)
_LAST_STEP: Final = sa.select(sa.func.max(metric.c.step)).where(metric.c.job_id == sa.bindparam("job"))
_METRICS: Final = (
    sa.select(metric.c.step, metric.c.epoch, metric.c.name, metric.c.value)
    .where(metric.c.job_id == sa.bindparam("job"), metric.c.step > sa.bindparam("last"))
    .order_by(metric.c.step, metric.c.epoch, metric.c.name)
    .limit(MAX_METRICS)
)
