"""Workers and jobs for the tests of the queue."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from service.contract import leases, queue
from service.contract.dialects import after
from service.contract.jobs import KINDS, IngestArgs, Lane
from service.contract.leases import Claim, WorkerInfo
from service.contract.tables import alias as aliases
from service.contract.tables import dataset, job, model
from service.contract.tables import worker as workers
from service.contract.word import new_id


class World:
    """A database with workers in it, and the few moves that tests make."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self.ttl_s = 20.0

    def worker(self, name: str = "w1", **changes: Any) -> str:
        row: dict[str, Any] = {
            "id": name,
            "lanes": ["train", "bulk"],
            "kinds": list(KINDS),
            "host": "here",
            "boot": "now",
            "pid": 1,
            "endpoint": None,
            "device": "cpu",
            "version": "0",
        }
        leases.register(self.engine, WorkerInfo(**{**row, **changes}))
        return name

    def dataset(self, tenant: str = "t", state: str = "ready") -> str:
        with self.engine.begin() as conn:
            return self.dataset_in(conn, tenant, state)

    def dataset_in(self, conn: sa.Connection, tenant: str, state: str = "ingesting") -> str:
        found = new_id("ds")
        row: dict[str, Any] = {"id": found, "tenant_id": tenant, "name": "n", "source": "s", "state": state}
        if state == "ready":
            row |= {"artifact": f"datasets/{found}/1", "digest": "d" * 64}
        conn.execute(sa.insert(dataset), row)
        return found

    def model(self, tenant: str = "t", alias: str | None = None) -> str:
        found = new_id("model")
        row = {"id": found, "tenant_id": tenant, "artifact": f"models/{found}/1", "digest": "e" * 64, "info": {}}
        self.execute(sa.insert(model).values(row))
        if alias is not None:
            self.execute(sa.insert(aliases).values(tenant_id=tenant, name=alias, model_id=found))
        return found

    def ingest(self, tenant: str = "t", **options: Any) -> str:
        args = IngestArgs(dataset=self.dataset(tenant, "ingesting"), source="uploads/up_x/data.tar")
        with self.engine.begin() as conn:
            return queue.enqueue(conn, tenant=tenant, args=args, **options)

    def add(self, args: Any, tenant: str = "t", **options: Any) -> str:
        with self.engine.begin() as conn:
            return queue.enqueue(conn, tenant=tenant, args=args, **options)

    def claim(self, worker: str = "w1", lane: Lane = "bulk", limit: int = 1) -> list[Claim]:
        return leases.claim(self.engine, worker_id=worker, lane=lane, kinds=KINDS, ttl_s=self.ttl_s, limit=limit)

    def take(self, worker: str = "w1", lane: Lane = "bulk") -> Claim:
        (claim,) = self.claim(worker, lane)
        return claim

    def row(self, public_id: str) -> Any:
        with self.engine.connect() as conn:
            return conn.execute(sa.select(job).where(job.c.public_id == public_id)).one()

    def rows(self, table: sa.Table) -> list[Any]:
        with self.engine.connect() as conn:
            return list(conn.execute(sa.select(table)))

    def execute(self, statement: Any) -> None:
        with self.engine.begin() as conn:
            conn.execute(statement)

    def silence(self, name: str, seconds: float = 60) -> None:
        """Let a worker have been silent for this long."""
        since = after(sa.literal(-seconds, sa.Double))
        self.execute(sa.update(workers).where(workers.c.id == name).values(last_seen=since))

    def make_due(self) -> None:
        """Let everything that is scheduled be due."""
        self.execute(sa.update(job).values(run_at=after(sa.literal(-1.0, sa.Double))))
        leases.promote(self.engine)


@pytest.fixture
def world(engine: sa.Engine) -> World:
    return World(engine)
