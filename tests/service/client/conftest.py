"""A real API in a process of its own, and a queue whose worker is the test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from service.cli import main
from service.contract import leases, outcomes, queue
from service.contract.dialects import open_engine
from service.contract.jobs import KINDS, EvaluateArgs, EvaluateResult, IngestArgs
from service.contract.leases import Claim, WorkerInfo
from service.contract.tables import dataset, job, model
from service.contract.word import new_id

ROOT = Path(__file__).resolve().parents[3]
TENANT = "default"


class Served:
    """An API that can go away and come back at the same address, and the moves of one worker."""

    def __init__(self, folder: Path, template: Path, **environment: str) -> None:
        self.folder = folder
        self.database_url = f"sqlite:///{shutil.copy(template, folder / 'isthmus.db')}"
        self.engine = open_engine(self.database_url)
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        info = WorkerInfo(
            id="w1",
            lanes=["train", "bulk"],
            kinds=list(KINDS),
            host="here",
            boot="now",
            pid=1,
            endpoint=None,
            device="cpu",
            version="0",
        )
        leases.register(self.engine, info)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "service.cli", "api", "--port", str(self.port), "--data", str(self.folder)]
        environment = {"PYTHONPATH": str(ROOT), "ISTHMUS_DATABASE_URL": self.database_url}
        with (self.folder / "api.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | environment | self.environment, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{self.url}/healthz", trust_env=False).is_success:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, (self.folder / "api.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def ingest(self, **options: Any) -> str:
        args = IngestArgs(dataset=new_id("ds"), source="uploads/up_x/data.tar")
        with self.engine.begin() as conn:
            row = {"id": args.dataset, "tenant_id": TENANT, "name": "n", "source": "s", "state": "ingesting"}
            conn.execute(sa.insert(dataset), row)
            return queue.enqueue(conn, tenant=TENANT, args=args, **options)

    def evaluate(self, **options: Any) -> str:
        data, model_id = new_id("ds"), new_id("model")
        row = {"tenant_id": TENANT, "digest": "d" * 64}
        ready = {"name": "n", "source": "s", "state": "ready", "artifact": f"datasets/{data}/1"}
        with self.engine.begin() as conn:
            conn.execute(sa.insert(dataset), row | ready | {"id": data})
            conn.execute(sa.insert(model), row | {"id": model_id, "artifact": f"models/{model_id}/1", "info": {}})
            args = EvaluateArgs(model=model_id, datasets=[data])
            return queue.enqueue(conn, tenant=TENANT, args=args, **options)

    def claim(self) -> Claim:
        leases.heartbeat(self.engine, "w1")
        (claim,) = leases.claim(self.engine, worker_id="w1", lane="bulk", kinds=KINDS, ttl_s=60, limit=1)
        return claim

    def record(self, claim: Claim, **reported: Any) -> None:
        assert outcomes.record(self.engine, claim, "w1", outcomes.Batch(**reported))

    def succeed(self, claim: Claim) -> None:
        result = EvaluateResult(artifact=f"reports/{claim.public_id}/1", summary={"recall@1": 0.5})
        assert outcomes.finish(self.engine, claim, "w1", result) == "succeeded"

    def fail(self, claim: Claim, message: str, *, retry: bool = False) -> None:
        error = {"type": "Permanent", "message": message, "code": None}
        outcomes.fail(self.engine, claim, "w1", error, retry=retry)

    def cancelled(self, claim: Claim) -> None:
        assert outcomes.cancelled(self.engine, claim, "w1") == "cancelled"

    def cancel(self, job_id: str) -> None:
        with self.engine.begin() as conn:
            queue.cancel(conn, TENANT, job_id)

    def row(self, job_id: str) -> Any:
        with self.engine.connect() as conn:
            return conn.execute(sa.select(job).where(job.c.public_id == job_id)).one()

    def close(self) -> None:
        self.stop()
        self.engine.dispose()


@pytest.fixture(scope="module")
def _shared(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("served"), sqlite_template)
    served.start()
    yield served
    served.close()


@pytest.fixture
def served(_shared: Served) -> Served:
    """A running API with an empty queue; `isthmus` reaches it by its settings."""
    with _shared.engine.begin() as conn:
        conn.execute(sa.delete(job))
    return _shared


@pytest.fixture
def serve(sqlite_template: Path, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start an API that is this test's alone: `serve(ISTHMUS_API_KEY=...)`."""
    made: list[Served] = []

    def start(**environment: str) -> Served:
        made.append(Served(tmp_path, sqlite_template, **environment))
        made[0].start()
        return made[0]

    yield start
    for each in made:
        each.close()


@pytest.fixture
def isthmus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `isthmus jobs` here; return its exit code and what it said on both streams."""

    def run(port: int, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("ISTHMUS_PORT", str(port))
        code = main(["jobs", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


class Watching:
    """`isthmus jobs` in a process of its own, whose lines are read as they come."""

    def __init__(self, port: int, *arguments: str) -> None:
        self.seen: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "jobs", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "ISTHMUS_PORT": str(port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, what: str) -> None:
        """Read on until a line says so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.seen.append(line.rstrip("\n"))
            if what in line:
                return
        pytest.fail(f"it ended without {what!r}: {self.seen}")

    def end(self) -> int:
        """Read to the end and return the exit code."""
        assert self.process.stdout is not None
        self.seen += self.process.stdout.read().splitlines()
        return self.process.wait(30)


@pytest.fixture
def watch() -> Iterator[Callable[..., Watching]]:
    """Start `isthmus jobs` beside the test: `watch(port, "follow", job_id)`."""
    made: list[Watching] = []

    def start(port: int, *arguments: str) -> Watching:
        made.append(Watching(port, *arguments))
        return made[-1]

    yield start
    for each in made:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()
        assert each.process.stdout is not None
        each.process.stdout.close()
