"""Our own queue: the real `claim` and `finish` in one process, without a runner.

The jobs are ingest jobs, one data set each: the kind that somebody with many small jobs has (one per upload), and the
only one that reads no artifact, as a no-op of the other systems reads none. Ending one also makes its data set ready,
which no other system is asked to do.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import time
from typing import Any, Final, final

import sqlalchemy as sa
from sqlalchemy import event

from benchmarks.queue_systems.commands import Ran, System, answer, serve
from service.contract import leases, outcomes, queue, wake
from service.contract.dialects import open_engine
from service.contract.jobs import IngestArgs, IngestResult
from service.contract.tables import dataset, job
from service.contract.word import new_id

TENANT: Final = "bench"
LANE: Final = "bulk"
FOREVER_S: Final = 3600.0
RESULT: Final = IngestResult(
    artifact="datasets/ds_bench/1",
    num_samples=1000,
    num_rejected=0,
    rejects=[],
    modalities={"image": "image", "text": "text"},
    splits={"train": 900, "holdout": 100},
    labels=[],
    statistics={"image": {"mean_bytes": 1.0}, "text": {"mean_bytes": 1.0}},
    digest="0" * 64,
    num_bytes=1_000_000,
)


@final
class Ours(System):
    """The real `claim` and `finish`, in one process, without a runner."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = open_engine(url, pool_size=2)
        self.hasty = open_engine(url, pool_size=1)
        event.listen(self.hasty, "connect", _hasten)
        self.worker_id = ""

    async def install(self) -> None:
        """Do nothing: whoever made the database migrated it."""

    async def fill(self, num: int) -> None:
        """Fill with queued jobs."""
        self.store(num, 0)

    async def prepare(self) -> None:
        """Register."""
        self.worker_id = new_id("w")
        info = leases.WorkerInfo(self.worker_id, [LANE], ["ingest"], "bench", "bench", os.getpid(), None, "cpu", "0")
        leases.register(self.engine, info)

    async def drain(self, size: int, ran: Ran) -> None:
        """Claim and finish, one by one or in batches."""
        while claims := self.claim(self.engine, size):
            for _ in claims:
                ran.no_op()
            if size == 1:
                states = [outcomes.finish(self.engine, claims[0], self.worker_id, RESULT)]
            else:
                states = outcomes.finish_many(self.engine, self.worker_id, [(claim, RESULT) for claim in claims])
            assert set(states) == {"succeeded"}, states

    def claim(self, engine: sa.Engine, size: int, ttl_s: float = FOREVER_S) -> list[leases.Claim]:
        """Claim as a supervisor does."""
        return leases.claim(engine, worker_id=self.worker_id, lane=LANE, kinds=["ingest"], ttl_s=ttl_s, limit=size)

    async def obey(self, command: str, **how: Any) -> dict[str, Any]:
        """Do what only our part of the measurement needs."""
        match command:
            case "store":
                self.store(**how)
                await self.prepare()
                return {}
            case "claims":
                return {"times": self.claims_ms(**how)}
            case "wait":
                return self.wait(**how)
            case _:
                return await super().obey(command, **how)

    def store(self, num: int, num_kept: int) -> None:
        """Empty the tables; add jobs, and finished ones with their events and results."""
        names = "job, dataset, worker, tenant_queue"
        with self.engine.begin() as conn:
            if conn.dialect.name == "postgresql":
                conn.exec_driver_sql(f"TRUNCATE {names} CASCADE")
            else:
                for name in names.split(", "):
                    conn.exec_driver_sql(f"DELETE FROM {name}")
            made_by = {"id": "ds_0", "tenant_id": TENANT, "name": "bench", "source": "memory"}
            conn.execute(sa.insert(dataset), made_by | {"state": "ingesting"})
            args = IngestArgs(dataset="ds_0", source="uploads/up_bench/data.tar")
            one = queue.enqueue(conn, tenant=TENANT, args=args)
            for first, last, kept in ((1, num_kept, True), (num_kept + 1, num_kept + num, False)):
                if last >= first:
                    _copy(conn, one, first, last, kept=kept)
            conn.execute(sa.delete(job).where(job.c.public_id == one))
            conn.execute(sa.delete(dataset).where(dataset.c.id == "ds_0"))
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.exec_driver_sql("ANALYZE")

    def claims_ms(self, num: int, *, durable: bool) -> list[float]:
        """Time calls of `claim`, milliseconds, with or without the flush of the commit; then finish the jobs."""
        engine = self.engine if durable else self.hasty
        times: list[float] = []
        held: list[leases.Claim] = []
        for _ in range(num):
            began = time.perf_counter()
            held += self.claim(engine, 1)
            times.append(1000 * (time.perf_counter() - began))
        assert len(held) == num
        outcomes.finish_many(self.engine, self.worker_id, [(claim, RESULT) for claim in held])
        return times[5:]  # the first ones fill caches

    def wait(self, *, claiming: bool) -> dict[str, Any]:
        """Wait for a hint, as a supervisor does, and claim; return both times."""
        listener = wake.Listener(self.engine)
        listener.open()
        if claiming:
            self.claim(self.engine, 1)  # nothing, but the connection is warm
        answer({"waiting": True})
        woken = listener.wait(10)
        woke = time.monotonic()
        claims = self.claim(self.engine, 1) if claiming else []
        claimed = time.monotonic()
        listener.close()
        for claim in claims:
            outcomes.finish(self.engine, claim, self.worker_id, RESULT)
        return {"woken": woken, "woke": woke, "claimed": claimed, "num": len(claims)}


def _copy(conn: sa.Connection, one: str, first: int, last: int, *, kept: bool) -> None:
    # In SQL and from a row that `enqueue` made, so that a million rows take seconds and a new column does no harm.
    numbers = "WITH RECURSIVE n(i) AS (SELECT CAST(:first AS bigint) UNION ALL SELECT i + 1 FROM n WHERE i < :last)"
    is_pg = conn.dialect.name == "postgresql"
    args = "replace(CAST(one.args AS text), 'ds_0', 'ds_' || i)"
    columns = {column.name: f"one.{column.name}" for column in job.columns if column.name != "id"}
    columns |= {
        "public_id": "'job_' || i",
        "fair_seq": "one.fair_seq + 1000 * i",
        "args": f"CAST({args} AS jsonb)" if is_pg else args,
    }
    if kept:
        columns |= {
            "state": "'succeeded'",
            "finished_at": "one.created_at",
            "started_at": "one.created_at",
            "attempt": "1",
            "lease_epoch": "1",
        }
    span = {"first": first, "last": last, "one": one}
    into = f"INSERT INTO job ({', '.join(columns)}) {numbers}"
    conn.execute(
        sa.text(f"{into} SELECT {', '.join(columns.values())} FROM job AS one, n WHERE public_id = :one"), span
    )
    columns = {column.name: f"one.{column.name}" for column in dataset.columns} | {"id": "'ds_' || i"}
    into = f"INSERT INTO dataset ({', '.join(columns)}) {numbers}"
    conn.execute(sa.text(f"{into} SELECT {', '.join(columns.values())} FROM dataset AS one, n WHERE id = 'ds_0'"), span)
    done = "job.state = 'succeeded'" if kept else "job.state = 'queued'"
    for kind in ("queued", "started", "succeeded") if kept else ("queued",):
        conn.execute(
            sa.text(
                "INSERT INTO job_event (job_id, tenant_id, epoch, at, type, detail)"
                f" SELECT id, tenant_id, lease_epoch, created_at, '{kind}', '{{}}' FROM job"
                f" WHERE {done} AND public_id <> :one"
            ),
            {"one": one},
        )
    if kept:
        conn.execute(
            sa.text(
                "INSERT INTO job_result (job_id, tenant_id, epoch, body, created_at)"
                f" SELECT id, tenant_id, lease_epoch, {'CAST(:body AS jsonb)' if is_pg else ':body'}, created_at"
                f" FROM job WHERE {done}"
            ),
            {"body": RESULT.model_dump_json()},
        )


def _hasten(connection: Any, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")
    else:
        connection.execute("SET synchronous_commit TO off")
        connection.commit()


if __name__ == "__main__":
    asyncio.run(serve(Ours(sys.argv[1])))
