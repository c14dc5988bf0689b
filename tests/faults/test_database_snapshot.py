"""A session that holds a snapshot keeps every dead row of the queue from being removed: claims must not crawl."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.contract import leases, outcomes, queue
from service.contract.jobs import KINDS, IngestArgs
from service.contract.tables import job
from service.contract.transact import transact
from tests.faults.noop_worker import result_of
from tests.faults.test_database_cuts import worker_info
from tests.faults.test_database_outage import serve

POSTGRESQL_ONLY = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
BATCH = 16


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


def work_for(engine: sa.Engine, seconds: float) -> list[float]:
    """Enqueue, claim and finish for a while; return how long each claim took, milliseconds."""
    took: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        transact(engine, _enqueue)
        start = time.perf_counter()
        claims = leases.claim(engine, worker_id="w1", lane="bulk", kinds=KINDS, ttl_s=600, limit=BATCH)
        took.append((time.perf_counter() - start) * 1000)
        assert len(claims) == BATCH
        states = outcomes.finish_many(engine, "w1", [(claim, result_of(claim)) for claim in claims])
        assert states == ["succeeded"] * BATCH
    return sorted(took)


def _enqueue(conn: sa.Connection) -> None:
    for _ in range(BATCH):
        queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing"))


@pytest.mark.anyio
@POSTGRESQL_ONLY
@pytest.mark.parametrize("held_s", [10, pytest.param(60, marks=pytest.mark.slow)])
async def test_claims_stay_quick_beside_a_snapshot_that_is_held_and_the_metrics_tell_of_it(
    database_url: str,
    engine: sa.Engine,
    tmp_path: Path,
    held_s: int,
    record_property: Callable[[str, object], None],
) -> None:
    leases.register(engine, worker_info("w1"))
    work_for(engine, 1)
    before = work_for(engine, 2)
    async with serve(tmp_path, database_url) as (client, _service):
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as reader, reader.begin():
            # Longer than a session of ours may be idle within a transaction: this one is somebody else's.
            reader.execute(sa.text("SET idle_in_transaction_session_timeout = 0"))
            num = reader.execute(sa.select(sa.func.count()).select_from(job)).scalar_one()
            work_for(engine, held_s * 0.75)
            after = work_for(engine, held_s * 0.25)
            metrics = (await client.get("/metrics")).text
            assert reader.execute(sa.select(sa.func.count()).select_from(job)).scalar_one() == num
    with engine.connect() as conn:
        done = conn.execute(sa.select(sa.func.count()).select_from(job)).scalar_one()
    figures = {
        "jobs_per_s": round((done - num) / held_s),
        "p50_ms_before": round(before[len(before) // 2], 1),
        "p50_ms": round(after[len(after) // 2], 1),
        "p99_ms_before": round(before[int(len(before) * 0.99)], 1),
        "p99_ms": round(after[int(len(after) * 0.99)], 1),
    }
    for name, value in figures.items():
        record_property(name, value)
    assert figures["p50_ms"] < 10 * figures["p50_ms_before"] + 50, figures
    assert figures["p99_ms"] < 20 * figures["p99_ms_before"] + 250, figures
    age = [line for line in metrics.splitlines() if line.startswith("isthmus_oldest_snapshot_age_seconds ")]
    assert age, metrics
    assert float(age[0].split()[1]) >= held_s - 1
