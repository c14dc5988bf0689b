"""PgBouncer in transaction mode in front of a test's server: few connections, none of which belongs to a client."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self, final

import pytest
import sqlalchemy as sa

# `options` carries our time-outs: a pooler cannot give them to a connection that is everybody's, so in production they
# are set for the role (ALTER ROLE ... SET statement_timeout = '8s', and so on).
_SETTINGS = """\
[databases]
* = host={host} port={port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
ignore_startup_parameters = options,extra_float_digits
server_idle_timeout = 2
logfile = {folder}/log
pidfile = {folder}/pid
"""


@final
class PgBouncer:
    """A pooler of our own, as long as the `with` block; skips the test where it is not installed."""

    def __init__(self, url: str) -> None:
        self._server = sa.make_url(url)
        self._folder = Path(tempfile.mkdtemp(prefix="isthmus-bouncer-", dir="/tmp"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port: int = listener.getsockname()[1]

    def __enter__(self) -> Self:
        binary = os.environ.get("ISTHMUS_TEST_PGBOUNCER") or shutil.which("pgbouncer")
        if binary is None:
            pytest.skip("pgbouncer is not installed; ISTHMUS_TEST_PGBOUNCER names its program")
        user = "pgserver" if os.geteuid() == 0 else None  # it refuses to run as root
        host, port = self._server.query["host"], self._server.port or 5432
        settings = self._folder / "settings.ini"
        settings.write_text(_SETTINGS.format(host=host, port=port, listen=self._port, folder=self._folder))
        if user is not None:
            for path in (self._folder, settings):
                shutil.chown(path, user)
        self._process = subprocess.Popen(
            [binary, "-q", str(settings)], user=user, cwd="/tmp", stderr=subprocess.DEVNULL
        )
        give_up_at = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
            except OSError:
                assert time.monotonic() < give_up_at, (self._folder / "log").read_text()
                time.sleep(0.05)
            else:
                return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def url_of(self, url: str) -> str:
        """Return the URL of a database of the server, through the pooler."""
        query = {"sslmode": "disable", "prepare_threshold": "none"}  # for versions before 1.21
        pooled = sa.make_url(url).set(host="127.0.0.1", port=self._port, query=query)
        return pooled.render_as_string(hide_password=False)
