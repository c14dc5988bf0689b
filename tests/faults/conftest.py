"""What every fault is judged by: a ledger, the invariants of the queue, and workers that only write to the ledger."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract import queue
from service.contract.jobs import IngestArgs
from service.contract.tables import job, job_event, job_result
from tests.faults.ledger import Ledger
from tests.supervisors import ROOT, World

ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger for this test's workers."""
    made = Ledger(tmp_path / "ledger")
    yield made
    made.close()


@pytest.fixture(scope="session")
def check_invariants() -> Callable[..., Counter[str]]:
    """Assert what no fault may break: `check_invariants(engine, acknowledged)`; returns the number of jobs by state.

    Every acknowledged job (public ids) exists; every job has ended, once; a succeeded job has exactly one result, of
    its last lease; no other job has one. Call it when all work is done: `until_all_ended(engine)` waits for that.
    """
    return _check_invariants


def _check_invariants(engine: sa.Engine, acknowledged: Iterable[str] = ()) -> Counter[str]:
    with engine.connect() as conn:
        jobs = conn.execute(sa.select(job)).all()
        results = conn.execute(sa.select(job_result.c.job_id, job_result.c.epoch)).all()
        events = conn.execute(sa.select(job_event.c.job_id, job_event.c.type, job_event.c.detail)).all()
    assert set(acknowledged) <= {row.public_id for row in jobs}, "an acknowledged job is gone"
    assert not [row.public_id for row in jobs if row.state not in ENDED], "a job never ended"
    assert not [row.public_id for row in jobs if row.attempt > row.max_attempts]
    # job_result's primary key already allows no second row; its epoch says that the fence held.
    stored = {row.job_id: row.epoch for row in results}
    assert stored == {row.id: row.lease_epoch for row in jobs if row.state == "succeeded"}
    ends = Counter(row.job_id for row in events if row.type in ENDED)
    again = Counter(row.job_id for row in events if row.type == "queued" and (row.detail or {}).get("retry"))
    assert not [row.public_id for row in jobs if ends[row.id] != 1 + again[row.id]], "a job ended twice"
    return Counter(row.state for row in jobs)


@pytest.fixture(scope="session")
def until_all_ended() -> Callable[..., None]:
    """Wait until no job is left to do: `until_all_ended(engine, timeout_s=60)`."""
    return _until_all_ended


def _until_all_ended(engine: sa.Engine, timeout_s: float = 60) -> None:
    unfinished = sa.select(sa.func.count()).select_from(job).where(job.c.finished_at.is_(None))
    give_up_at = time.monotonic() + timeout_s
    while num := _count(engine, unfinished):
        assert time.monotonic() < give_up_at, f"{num} jobs have not ended in {timeout_s} s"
        time.sleep(0.05)


def _count(engine: sa.Engine, query: sa.Select[Any]) -> int:
    with engine.connect().execution_options(sqlite_read=True) as conn:
        return conn.execute(query).scalar_one()


@pytest.fixture
def enqueue_many(engine: sa.Engine) -> Callable[..., list[str]]:
    """Enqueue jobs for no-op workers: `enqueue_many(300)`; returns the public ids."""

    def enqueue_many(num: int, tenant: str = "t") -> list[str]:
        found: list[str] = []
        for start in range(0, num, 250):  # short transactions: others write meanwhile
            with engine.begin() as conn:
                for index in range(start, min(num, start + 250)):
                    args = IngestArgs(dataset=f"ds_{index}", source="nothing")
                    found.append(queue.enqueue(conn, tenant=tenant, args=args))
        return found

    return enqueue_many


@pytest.fixture
def record_figures(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """Print figures and keep them in the report: `record_figures(kills=7)`."""

    def record_figures(**figures: float) -> None:
        for name, value in figures.items():
            record_property(name, value)
        sys.stdout.write(f"{request.node.name}: {figures}\n")

    return record_figures


class NoopWorkers:
    """Processes that claim, write to the ledger and finish."""

    def __init__(self, url: str, ledger: Ledger) -> None:
        self._command = [sys.executable, "-P", str(Path(__file__).with_name("noop_worker.py"))]
        self._command += ["--database", url, "--ledger", str(ledger.path)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start one; options are `--ttl-s`, `--heartbeat-s`, `--work-s`, `--batch`, each with its value."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._processes.append(subprocess.Popen([*self._command, *options], env=environment))
        return self._processes[-1]

    def stop(self) -> None:
        """Kill those that still run."""
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def noop_workers(database_url: str, ledger: Ledger) -> Iterator[NoopWorkers]:
    """No-op workers on this test's database: `process = noop_workers.start("--ttl-s", "1")`."""
    made = NoopWorkers(database_url, ledger)
    yield made
    made.stop()


@pytest.fixture
def odd_world(world: World, ledger: Ledger) -> World:
    """Real supervisors whose ingest jobs misbehave where their source says so: see `odd_jobs.py`.

    `ISTHMUS_SABOTAGE` in a worker's environment lets the supervisor itself die at a moment: see `sabotage`.
    """
    world.environment["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).with_name("sabotage")), str(ROOT)))
    world.environment["ISTHMUS_LEDGER"] = str(ledger.path)
    return world
