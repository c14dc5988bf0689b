"""Clocks that are wrong: a worker's on PostgreSQL matters to nobody, the database's own costs time, never a result."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa

from service.contract import queue
from service.contract.dialects import open_engine
from service.contract.jobs import IngestArgs
from service.contract.tables import job
from tests.faults.conftest import NoopWorkers
from tests.faults.ledger import Ledger
from tests.faults.servers import DurableServer, until

SQLITE_ONLY = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
POSTGRESQL_ONLY = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
HOUR_S: Final = 3600
LIBRARY: Final = [*Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), *Path("/usr/lib").glob("faketime/*MT.so.1")]

# Runs a script with a clock that is off by the seconds in a file: what the file says can change while it runs.
SHIFTED: Final = """
import runpy, sys, time
source, script = sys.argv[1:3]
ns, s = time.time_ns, time.time
def offset():
    with open(source) as file:
        return int(file.read() or "0")
time.time_ns = lambda: ns() + offset() * 10**9
time.time = lambda: s() + offset()
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


class Clock:
    """Workers whose clock is off by as much as we say."""

    def __init__(self, path: Path, url: str, ledger: Ledger, offset_s: int = 0) -> None:
        self._path = path
        self.step(offset_s)
        self.workers = NoopWorkers(url, ledger)
        python, _, script, *rest = self.workers._command
        self.workers._command = [python, "-P", "-c", SHIFTED, str(path), script, *rest]

    def step(self, offset_s: int) -> None:
        fresh = self._path.with_suffix(".new")
        fresh.write_text(str(offset_s))
        fresh.replace(self._path)


@pytest.fixture
def clocks(database_url: str, ledger: Ledger, tmp_path: Path) -> Iterator[Callable[..., Clock]]:
    made: list[Clock] = []

    def make(offset_s: int = 0) -> Clock:
        made.append(Clock(tmp_path / f"clock-{len(made)}", database_url, ledger, offset_s))
        return made[-1]

    yield make
    for clock in made:
        clock.workers.stop()


def test_workers_an_hour_ahead_and_behind_store_one_result_for_every_job(
    clocks: Callable[..., Clock],
    engine: sa.Engine,
    ledger: Ledger,
    enqueue_many: Callable[..., list[str]],
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
) -> None:
    acknowledged = enqueue_many(60)
    for offset_s in (0, HOUR_S, -HOUR_S):
        clocks(offset_s).workers.start("--ttl-s", "2", "--work-s", "0.1")
    until_all_ended(engine)
    states = check_invariants(engine, acknowledged)
    finished = Counter(entry.job for entry in ledger.read("finish"))
    assert max(finished.values()) == 1
    if engine.dialect.name == "postgresql":  # whose clock decides: nothing at all happens
        assert states == {"succeeded": 60}
        assert Counter(entry.job for entry in ledger.read("start")) == dict.fromkeys(acknowledged, 1)
        assert len({entry.pid for entry in ledger.read("finish")}) == 3
    else:  # one host has one clock; where it has not, leases are taken from each other, and some jobs are given up
        assert len(finished) == states["succeeded"]


@POSTGRESQL_ONLY
def test_a_worker_an_hour_ahead_starts_nothing_before_its_time(
    clocks: Callable[..., Clock], engine: sa.Engine, ledger: Ledger
) -> None:
    ahead = clocks(HOUR_S)
    with engine.begin() as conn:
        due = datetime.now(UTC) + timedelta(seconds=3)
        public_id = queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing"), run_at=due)
    ahead.workers.start("--ttl-s", "2")
    until(lambda: ledger.read("finish"), 30)
    with engine.connect() as conn:
        row = conn.execute(sa.select(job).where(job.c.public_id == public_id)).one()
    assert row.started_at >= row.run_at == due


@SQLITE_ONLY
@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S])
def test_a_host_whose_clock_steps_loses_time_but_no_result(
    clocks: Callable[..., Clock],
    engine: sa.Engine,
    ledger: Ledger,
    enqueue_many: Callable[..., list[str]],
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
    step_s: int,
) -> None:
    acknowledged = enqueue_many(80)
    clock = clocks()
    for _ in range(2):
        clock.workers.start("--ttl-s", "2", "--work-s", "0.05")
    until(lambda: len(ledger.read("finish")) > 20, 60)
    clock.step(step_s)
    until_all_ended(engine)
    assert check_invariants(engine, acknowledged) == {"succeeded": 80}
    assert set(Counter(entry.job for entry in ledger.read("finish")).values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S])
def test_a_server_whose_clock_steps_loses_time_but_no_result(
    tmp_path: Path,
    ledger: Ledger,
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
    step_s: int,
) -> None:
    if not LIBRARY:
        pytest.skip("libfaketime is not installed")
    server = DurableServer()
    clock = server.folder / "clock"
    clock.write_text("+0\n")
    clock.chmod(0o644)
    server.kill()
    server.start(
        LD_PRELOAD=str(LIBRARY[0]),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    url = server.make_database()
    engine = open_engine(url)
    workers = NoopWorkers(url, ledger)
    try:
        with engine.begin() as conn:
            acknowledged = [
                queue.enqueue(conn, tenant="t", args=IngestArgs(dataset=f"ds_{index}", source="nothing"))
                for index in range(80)
            ]
        for _ in range(2):
            workers.start("--ttl-s", "2", "--work-s", "0.05")
        until(lambda: len(ledger.read("finish")) > 20, 60)
        clock.write_text(f"{step_s:+d}\n")
        with engine.connect() as conn:
            told = conn.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
        assert abs(float(told) - time.time() - step_s) < 60
        until_all_ended(engine)
        assert check_invariants(engine, acknowledged) == {"succeeded": 80}
        assert set(Counter(entry.job for entry in ledger.read("finish")).values()) == {1}
    finally:
        workers.stop()
        engine.dispose()
        server.stop()
