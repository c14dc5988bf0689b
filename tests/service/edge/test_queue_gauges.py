from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event

from service.contract.tables import job, worker
from service.contract.transact import read
from service.database import Database
from service.edge import queue_gauges
from service.edge.queue_gauges import QueueGauges, look

pytestmark = pytest.mark.anyio

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def add_jobs(engine: sa.Engine, state: str, num: int = 1, lane: str = "bulk", **columns: Any) -> None:
    row: dict[str, Any] = {
        "tenant_id": "tenant-secret",
        "lane": lane,
        "kind": "ingest",
        "state": state,
        "fair_seq": 0,
        "deadline_s": 1,
        "args": {"kind": "ingest"},
        "run_at": datetime.now(UTC),
    }
    if state == "running":
        row["worker_id"] = "w1"
    if state == "succeeded":
        row["finished_at"] = datetime.now(UTC)
    start = time.monotonic_ns()
    with engine.begin() as conn:
        conn.execute(sa.insert(job), [{**row, **columns, "public_id": f"job_{start + at}"} for at in range(num)])


def add_worker(engine: sa.Engine, name: str, **columns: Any) -> None:
    row: dict[str, Any] = {
        "id": name,
        "lanes": ["train", "bulk"],
        "kinds": [],
        "host": "h",
        "boot": "b",
        "pid": 1,
        "version": "0",
        "draining": False,
        "last_seen": datetime.now(UTC),
    }
    with engine.begin() as conn:
        conn.execute(sa.insert(worker).values(**{**row, **columns}))


def shown(gauges: QueueGauges) -> Samples:
    registry = CollectorRegistry()
    registry.register(gauges)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


def at(lane: str, state: str) -> tuple[tuple[str, str], ...]:
    return (("lane", lane), ("state", state))


async def test_jobs_are_counted_by_lane_and_state_with_the_age_of_the_oldest(engine: sa.Engine) -> None:
    add_jobs(engine, "queued", 3)
    add_jobs(engine, "queued", run_at=ago(100))
    add_jobs(engine, "scheduled", 2, lane="train", run_at=datetime.now(UTC) + timedelta(hours=1))
    add_jobs(engine, "running", lane="train", started_at=ago(50), run_at=ago(500))
    add_jobs(engine, "succeeded", 5, run_at=ago(9000))
    gauges = QueueGauges(Database(engine), ttl_s=20)
    await gauges.refresh()
    found = shown(gauges)
    assert found["isthmus_database_up", ()] == 1
    jobs = {key[1]: num for key, num in found.items() if key[0] == "isthmus_queue_jobs"}
    expected = {("bulk", "queued"): 4, ("train", "scheduled"): 2, ("train", "running"): 1}
    states = ("scheduled", "queued", "running")
    assert jobs == {at(lane, state): expected.get((lane, state), 0) for lane in ("bulk", "train") for state in states}
    ages = {key[1]: age_s for key, age_s in found.items() if key[0] == "isthmus_queue_oldest_age_seconds"}
    assert 100 <= ages[at("bulk", "queued")] < 130
    assert 50 <= ages[at("train", "running")] < 80
    assert ages[at("train", "scheduled")] == ages[at("train", "queued")] == 0
    add_jobs(engine, "scheduled", run_at=ago(30))
    assert 30 <= read(engine, lambda conn: look(conn, 20)).oldest_age_s["bulk", "scheduled"] < 60
    assert not [key for key in found if "secret" in str(key)]


async def test_workers_are_live_draining_or_silent(engine: sa.Engine) -> None:
    add_worker(engine, "w1")
    add_worker(engine, "w2", draining=True, lanes=["serve"])
    add_worker(engine, "w3", last_seen=ago(60))
    gauges = QueueGauges(Database(engine), ttl_s=20)
    await gauges.refresh()
    found = shown(gauges)
    states = {dict(key[1])["state"]: num for key, num in found.items() if key[0] == "isthmus_workers"}
    assert states == {"live": 1, "draining": 1, "silent": 1}
    ages = {key[1]: age_s for key, age_s in found.items() if key[0] == "isthmus_worker_heartbeat_age_seconds"}
    assert ages.keys() == {
        (("lanes", "bulk,train"), ("worker", "w1")),
        (("lanes", "serve"), ("worker", "w2")),
        (("lanes", "bulk,train"), ("worker", "w3")),
    }
    assert 60 <= ages[("lanes", "bulk,train"), ("worker", "w3")] < 90


async def test_a_held_snapshot_is_told_on_postgresql_alone(engine: sa.Engine) -> None:
    def age_s() -> float | None:
        return read(engine, lambda conn: look(conn, 20)).snapshot_age_s

    if engine.dialect.name == "sqlite":
        assert age_s() is None
        return
    assert age_s() == 0
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as held:
        held.execute(sa.text("SELECT 1 FROM job"))
        await anyio.sleep(0.3)
        assert 0.3 <= (age_s() or 0) < 30
    assert age_s() == 0


async def test_no_query_walks_the_finished_jobs(engine: sa.Engine) -> None:
    add_jobs(engine, "succeeded", 5000)
    for state in ("queued", "scheduled", "running"):
        add_jobs(engine, state, 20)
    with engine.connect() as conn:
        conn.execute(sa.text("ANALYZE"))
        conn.commit()
    for query, index in (
        (queue_gauges._QUEUED, "job_fair"),
        (queue_gauges._QUEUED_SINCE, "job_fair"),
        (queue_gauges._SCHEDULED, "job_due"),
        (queue_gauges._RUNNING, "job_running"),
    ):
        plan = explain(engine, query)
        assert index in plan, plan
        assert "Seq Scan on job" not in plan, plan
        assert "SCAN job" not in plan.replace("SCAN job USING", ""), plan
    if engine.dialect.name == "postgresql":
        assert "Index Only Scan using job_fair" in explain(engine, queue_gauges._QUEUED)


async def test_the_database_is_read_once_in_a_while_however_often_it_is_asked(engine: sa.Engine) -> None:
    gauges = QueueGauges(Database(engine), ttl_s=20, every_s=0.4)
    with counted(engine) as statements:
        await gauges.refresh()
        once = len(statements)
        for _ in range(20):
            await gauges.refresh()
        assert len(statements) == once
        await anyio.sleep(0.5)
        await gauges.refresh()
        assert len(statements) == 2 * once


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_database_that_hangs_is_not_waited_for_and_asked_by_one_at_a_time(engine: sa.Engine) -> None:
    gauges = QueueGauges(Database(engine), ttl_s=20, every_s=0, wait_s=0.2)
    await gauges.refresh()
    assert shown(gauges)["isthmus_database_up", ()] == 1
    with engine.begin() as blocking, counted(engine) as statements:
        blocking.execute(sa.text("LOCK TABLE job IN ACCESS EXCLUSIVE MODE"))
        began = time.monotonic()
        for _ in range(3):
            await gauges.refresh()
            assert shown(gauges) == {("isthmus_database_up", ()): 0}
        assert time.monotonic() - began < 1.8
        assert len([sql for sql in statements if "count(*)" in sql]) == 1
    await gauges.close()
    await gauges.refresh()
    assert shown(gauges)["isthmus_database_up", ()] == 1


async def test_an_application_without_a_database_says_so_and_leaves_the_queue_out(start: Any, tmp_path: Any) -> None:
    async with start(f"sqlite:///{tmp_path / 'missing' / 'folder' / 'x.db'}") as api:
        text = (await api.get("/metrics")).text
    assert "isthmus_database_up 0.0" in text
    assert "isthmus_queue" not in text


async def test_the_application_shows_its_queue(api: Any) -> None:
    add_jobs(api.service.database.engine, "queued", 2)
    text = (await api.get("/metrics")).text
    assert 'isthmus_queue_jobs{lane="bulk",state="queued"} 2.0' in text
    assert ("isthmus_oldest_snapshot_age_seconds" in text) == (api.service.database.engine.dialect.name == "postgresql")
    assert "tenant-secret" not in text


def explain(engine: sa.Engine, query: Any) -> str:
    sent: list[tuple[str, Any]] = []

    def listen(_conn: Any, _cursor: Any, statement: str, values: Any, _context: Any, _many: bool) -> None:
        sent.append((statement, values))

    with engine.connect() as conn:
        event.listen(engine, "before_cursor_execute", listen)
        conn.execute(query, {"at_lane": "bulk"})
        event.remove(engine, "before_cursor_execute", listen)
        prefix = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
        ((statement, values),) = sent[-1:]
        rows = conn.exec_driver_sql(prefix + statement, values).all()
    return "\n".join(str(row[-1]) for row in rows)


@contextmanager
def counted(engine: sa.Engine) -> Generator[list[str]]:
    statements: list[str] = []

    def listen(_conn: Any, _cursor: Any, statement: str, _values: Any, _context: Any, _many: bool) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", listen)
    yield statements
    event.remove(engine, "before_cursor_execute", listen)
