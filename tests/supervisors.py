"""Real supervisors for tests: a data folder, a database, workers as processes, and a data set that arrives slowly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from service.contract import queue
from service.contract.artifacts import open_store
from service.contract.jobs import IngestArgs
from service.contract.tables import dataset, job, job_progress
from service.contract.word import new_id

ROOT = Path(__file__).resolve().parents[1]


class Feed:
    """A data set that arrives for as long as the test wants: JSON lines through a named pipe in the store."""

    def __init__(self, data: Path) -> None:
        store = open_store(str(data / "store"))
        key, _, _ = store.write_upload("captions.jsonl", [b""])
        self.source = f"store:{key}"
        self._path = data / "store" / key
        self._path.unlink()
        os.mkfifo(self._path)
        # Open for both, so that a reader that goes and one that comes never see an end in between.
        self._pipe = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Let the data set be complete."""
        self._ended.set()
        self._thread.join(5)

    def _run(self) -> None:
        num = 0
        while not self._ended.is_set():
            # A line is a page of the pipe, so no reader that gives up leaves half a line to the next.
            line = json.dumps({"caption": f"caption {num}", "note": ""}).encode()
            try:
                os.write(self._pipe, line[:-2] + b"a" * (4095 - len(line)) + line[-2:] + b"\n")
                num += 1
            except BlockingIOError:
                time.sleep(0.002)
            if num > 600:
                time.sleep(0.002)
        os.close(self._pipe)


class World:
    """A data folder, a database, and workers as processes."""

    def __init__(self, url: str, engine: sa.Engine, data: Path) -> None:
        self.engine = engine
        self.data = data
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "ISTHMUS_DATA": str(data),
            "ISTHMUS_DATABASE_URL": url,
            "ISTHMUS_LANES": "bulk",
            "ISTHMUS_PRELOAD": "false",
            "ISTHMUS_TICK_S": "0.2",
            "ISTHMUS_HEARTBEAT_S": "0.3",
            "ISTHMUS_WORKER_TTL_S": "2.5",
            "ISTHMUS_CANCEL_GRACE_S": "0.5",
            "ISTHMUS_SHUTDOWN_GRACE_S": "10",
        }
        self.feeds: list[Feed] = []
        self.workers: list[subprocess.Popen[bytes]] = []

    @contextmanager
    def worker(self, *prefix: str, **environment: str) -> Generator[subprocess.Popen[bytes]]:
        """Run a supervisor, started by the command `prefix` if there is one."""
        log = (self.data / f"worker-{len(self.workers)}.log").open("wb")
        command = [*prefix, sys.executable, "-P", "-m", "worker"]
        process = subprocess.Popen(command, env={**self.environment, **environment}, stderr=log, cwd=self.data)
        self.workers.append(process)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            log.close()

    def log(self, number: int = 0) -> str:
        lines = (self.data / f"worker-{number}.log").read_text().splitlines()
        return "\n".join(line[:300] for line in lines)

    def feed(self) -> Feed:
        self.feeds.append(Feed(self.data))
        return self.feeds[-1]

    def ingest(self, source: str) -> str:
        found = new_id("ds")
        with self.engine.begin() as conn:
            conn.execute(sa.insert(dataset).values(id=found, tenant_id="t", name="n", source=source))
            return queue.enqueue(
                conn, tenant="t", args=IngestArgs(dataset=found, source=source, modalities={"text": "caption"})
            )

    def row(self, public_id: str) -> Any:
        with self.engine.connect() as conn:
            return conn.execute(sa.select(job).where(job.c.public_id == public_id)).one()

    def rows(self, table: sa.Table) -> list[Any]:
        with self.engine.connect() as conn:
            return list(conn.execute(sa.select(table)))

    def until(self, condition: Callable[[], Any], timeout_s: float = 15) -> Any:
        give_up_at = time.monotonic() + timeout_s
        while not (found := condition()):
            if time.monotonic() > give_up_at:
                logs = "\n".join(self.log(number) for number in range(len(self.workers)))
                pytest.fail(f"it did not happen in {timeout_s} s\n{logs}")
            time.sleep(0.02)
        return found

    def until_state(self, public_id: str, *states: str) -> Any:
        return self.until(lambda: (row := self.row(public_id)).state in states and row)

    def until_it_reads(self, public_id: str, attempt: int = 1) -> None:
        """Wait until the job's runner reports progress in this attempt."""

        def reads() -> bool:
            row = self.row(public_id)
            assert row.finished_at is None, row.error
            return row.attempt == attempt and any(
                progress.job_id == row.id and progress.done and progress.epoch == row.lease_epoch
                for progress in self.rows(job_progress)
            )

        self.until(reads)


@pytest.fixture
def world(database_url: str, engine: sa.Engine, tmp_path: Path) -> Iterator[World]:
    data = tmp_path / "data"
    data.mkdir()
    made = World(database_url, engine, data)
    yield made
    for feed in made.feeds:
        feed.end()


def children(process: subprocess.Popen[bytes], word: str) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # gone by now
            if word in child.cmdline():
                found.append(child)
    return found


def runner_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    (found,) = children(process, "worker.runner")
    return found
