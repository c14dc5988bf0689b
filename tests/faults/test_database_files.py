"""SQLite as a file: many writers, a full disk, a power cut, and a place where it must not lie."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError

from service.contract import queue
from service.contract.dialects import open_engine, risks
from service.contract.host import network_file_system
from service.contract.jobs import IngestArgs
from service.contract.tables import job, job_result
from tests.faults.conftest import NoopWorkers
from tests.faults.ledger import Ledger
from tests.faults.servers import fill, small_file_system, until
from tests.supervisors import ROOT

SQLITE_ONLY = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
DATASET: Final = {"name": "captions", "uri": "s3://bucket/captions.jsonl", "modalities": {"text": "caption"}}

# Of a machine with a file server, another machine's folder over ssh, and a folder of its own within the former.
MOUNTS: Final = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard,resv_strict
31 27 0:30 / /srv/shared rw,relatime shared:12 - nfs4 server:/export rw,vers=4.2,rsize=1048576,addr=10.0.0.2
32 31 254:16 / /srv/shared/local rw,relatime shared:13 master:7 - xfs /dev/vdb rw,attr2,inode64
33 27 0:31 / /mnt/my\\040laptop rw,nosuid,nodev - fuse.sshfs me@laptop:/ rw,user_id=0,group_id=0
34 27 0:32 / /mnt/archive rw,relatime - fuseblk /dev/sdb1 rw,user_id=0
35 27 0:33 / /mnt/office rw,relatime - cifs //office/data rw,vers=3.1.1
36 27 0:34 / /host rw,relatime - 9p drvfs rw,dirsync
37 27 0:35 / /srv/twice rw,relatime - nfs server:/old rw
38 27 254:17 / /srv/twice rw,relatime - ext4 /dev/vdc rw
39 27 0:36 / /bucket rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/isthmus", None),
        ("/srv/shared/isthmus", "nfs4"),
        ("/srv/shared/local/isthmus", None),
        ("/srv/sharedbutnot", None),
        ("/mnt/my laptop/isthmus", "fuse.sshfs"),
        ("/mnt/archive/isthmus", None),
        ("/mnt/office", "cifs"),
        ("/host/c/data", "9p"),
        ("/srv/twice/isthmus", None),
        ("/bucket/isthmus", "fuse.s3fs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_innermost_mount(path: str, kind: str | None) -> None:
    assert network_file_system(Path(path), MOUNTS) == kind


def test_a_database_on_a_network_file_system_is_warned_of_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr("service.contract.host._MOUNTS", mounts)
    (warning,) = [risk for risk in risks("sqlite:////srv/shared/isthmus/isthmus.db") if "network" in risk]
    assert "nfs4" in warning
    assert "ISTHMUS_DATA " in warning
    assert "PostgreSQL" in warning
    assert not [risk for risk in risks("sqlite:////var/lib/isthmus/isthmus.db") if "network" in risk]
    assert risks("postgresql+psycopg://somewhere/isthmus") == []


def test_this_machine_says_of_its_own_temporary_folder_that_it_is_local(tmp_path: Path) -> None:
    assert network_file_system(tmp_path) is None
    assert network_file_system(tmp_path, "nonsense\n\n1 2 3 - x") is None


# Many writers

WRITER: Final = """
import sys, time, json
from service.contract import queue
from service.contract.dialects import open_engine
from service.contract.jobs import IngestArgs
from service.contract.transact import transact
url, num = sys.argv[1], int(sys.argv[2])
engine = open_engine(url, pool_size=1)
print("ready", flush=True)
sys.stdin.readline()
took = []
for _ in range(num):
    start = time.perf_counter()
    transact(engine, lambda conn: queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing")))
    took.append(time.perf_counter() - start)
    time.sleep(0.01)
print(json.dumps(took))
"""


def start_writer(url: str, num: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, url, str(num)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@SQLITE_ONLY
def test_eight_processes_write_one_file_and_none_is_told_that_it_is_busy(
    database_url: str, engine: sa.Engine, record_property: Callable[[str, object], None]
) -> None:
    writers = [start_writer(database_url, 60) for _ in range(8)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # all at once
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    ends = [writer.communicate(timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8, [error for _, error in ends]
    took = sorted(seconds for out, _ in ends for seconds in json.loads(out))
    p50_ms, p99_ms = (took[int(len(took) * share)] * 1000 for share in (0.5, 0.99))
    record_property("enqueue_p50_ms", round(p50_ms, 1))
    record_property("enqueue_p99_ms", round(p99_ms, 1))
    assert took[-1] < 10  # the busy time-out itself: nobody starved
    with engine.connect() as conn:
        assert conn.execute(sa.select(sa.func.count()).select_from(job)).scalar_one() == 480


# A power cut: what was on the disk at some moment, and nothing else


@SQLITE_ONLY
def test_a_copy_of_any_moment_is_whole_and_holds_all_that_was_acknowledged_before(
    database_url: str, engine: sa.Engine, ledger: Ledger, tmp_path: Path
) -> None:
    source = Path(sa.make_url(database_url).database or "")
    acknowledged: list[str] = []
    stop = threading.Event()

    def submit() -> None:
        while not stop.is_set():
            with engine.begin() as conn:
                args = IngestArgs(dataset="ds_x", source="nothing")
                public_id = queue.enqueue(conn, tenant="t", args=args)
            acknowledged.append(public_id)

    submitter = threading.Thread(target=submit)
    submitter.start()
    workers = NoopWorkers(database_url, ledger)
    workers.start("--ttl-s", "600", "--batch", "2")
    rng = random.Random(5)
    moments: list[tuple[Path, set[str], set[tuple[str, int]]]] = []
    try:
        until(lambda: len(ledger.read("finish")) > 5, 30)
        for number in range(12):
            time.sleep(rng.uniform(0.02, 0.3))
            folder = tmp_path / f"moment-{number}"
            folder.mkdir()
            known = set(acknowledged)
            finished = {(entry.job, entry.epoch) for entry in ledger.read("finish")}
            _snapshot(source, folder)
            moments.append((folder / source.name, known, finished))
    finally:
        stop.set()
        submitter.join()
        workers.stop()
    assert len({len(known) for _, known, _ in moments}) > 6
    for path, known, finished in moments:
        with sqlite3.connect(path) as conn:
            assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        conn.close()
        copy = open_engine(f"sqlite:///{path}")
        with copy.connect() as conn:
            assert known <= set(conn.execute(sa.select(job.c.public_id)).scalars())
            rows = conn.execute(sa.select(job.c.public_id, job_result.c.epoch).join(job_result)).all()
            assert finished <= {(row.public_id, row.epoch) for row in rows}
        copy.dispose()


@SQLITE_ONLY
def test_a_commit_is_on_the_disk_before_it_is_acknowledged(engine: sa.Engine) -> None:
    with engine.connect() as conn:
        assert conn.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL: the log is synced at each commit
        assert conn.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"


def _snapshot(source: Path, folder: Path) -> None:
    """Copy the database and its log as one moment: a writer stands still, but in the middle of whatever it does.

    The shared memory (`-shm`) is not on the disk after a power cut. The copy of the file comes first: pages that a
    checkpoint moves meanwhile are still in the log, which only starts anew from its beginning.
    """
    for _ in range(100):
        log = source.with_name(source.name + "-wal")
        before = (log.stat().st_size, log.read_bytes()[:32], source.stat().st_mtime_ns)
        shutil.copyfile(source, folder / source.name)
        shutil.copyfile(log, folder / log.name)
        if (log.read_bytes()[:32], source.stat().st_mtime_ns) == before[1:]:
            return  # no checkpoint in between: file and log belong together
    pytest.fail("the log never stood still")


# A full disk

SERVER: Final = """
import resource, signal, sys
import uvicorn
from pathlib import Path
from service.app import create_app
from service.contract.settings import Settings
folder, url, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
uvicorn.run(create_app(Settings(data=folder, database_url=url, store_url=str(folder / "store"))),
            host="127.0.0.1", port=port, log_level="warning")
"""


@SQLITE_ONLY
def test_a_file_that_cannot_grow_is_503_and_whole_and_goes_on_when_there_is_room(
    database_url: str, engine: sa.Engine, tmp_path: Path
) -> None:
    source = Path(sa.make_url(database_url).database or "")
    port = free_port()
    (tmp_path / "api").mkdir()
    server = subprocess.Popen(
        [sys.executable, "-P", "-c", SERVER, str(tmp_path / "api"), database_url, str(port)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until(lambda: answers(client), 60)
            accepted = [submit(client) for _ in range(3)]
            # The limit of the process stands for the disk: a write beyond it fails as on a full one.
            room = source.stat().st_size + 200_000
            _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (room, hard))
            full: list[httpx.Response] = []
            while len(full) < 3:
                answer = submit(client)
                (accepted if answer.status_code == 202 else full).append(answer)
                assert len(accepted) < 3000
            assert {answer.status_code for answer in full} <= {503, 507}, full[0].text
            assert all("retry-after" in answer.headers for answer in full)
            assert client.get("/v1/jobs").status_code == 200
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
            accepted.append(submit(client))
            assert accepted[-1].status_code == 202
    finally:
        server.kill()
        server.wait()
    with engine.connect() as conn:
        assert conn.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
        assert {answer.json()["job"]["id"] for answer in accepted} <= set(
            conn.execute(sa.select(job.c.public_id)).scalars()
        )


def submit(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/datasets", json=DATASET | {"name": "n" * 60})


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    with small_file_system(folder, "6m"):
        yield folder


def test_a_full_disk_is_no_damage_to_sqlite_and_its_workers_go_on(
    small_disk: Path,
    sqlite_template: Path,
    ledger: Ledger,
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
) -> None:
    shutil.copy(sqlite_template, small_disk / "isthmus.db")
    url = f"sqlite:///{small_disk / 'isthmus.db'}"
    engine = open_engine(url)
    workers = NoopWorkers(url, ledger)
    workers.start("--ttl-s", "2")
    ballast = small_disk / "ballast"
    acknowledged: list[str] = []
    try:
        refused = 0
        until(lambda: (acknowledged.append(enqueue(engine)), ledger.read("finish"))[1], 30)
        fill(ballast)
        while refused < 3:
            try:
                acknowledged.append(enqueue(engine))
            except OperationalError as error:
                if "full" not in str(error) and "I/O" not in str(error):
                    raise
                refused += 1
            assert len(acknowledged) < 5000
        ballast.unlink()
        acknowledged.append(enqueue(engine))
        until_all_ended(engine)
    finally:
        workers.stop()
    assert check_invariants(engine, acknowledged) == {"succeeded": len(acknowledged)}
    with engine.connect() as conn:
        assert conn.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    engine.dispose()


def enqueue(engine: sa.Engine) -> str:
    with engine.begin() as conn:
        return queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing"))
