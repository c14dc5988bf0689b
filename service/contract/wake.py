"""Wake-up hints: a new job starts in milliseconds, while the poll alone would already start it in time.

On PostgreSQL a hint is a NOTIFY without payload, which travels with the commit. On SQLite it is a datagram to every
socket in the data folder's socket folder. A hint may be lost, doubled or early: nothing may depend on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Final, cast

import psycopg
import sqlalchemy as sa

from service.contract.committed import Committed
from service.contract.deadline import TimedConnection
from service.contract.dialects import LINK
from service.contract.host import leave_socket_folder, make_socket_folder, socket_folder

CHANNEL: Final = "isthmus_job"
_PAUSE_S: Final = 5.0  # between two attempts to listen
_NOTIFY: Final = sa.select(sa.func.pg_notify(CHANNEL, ""))
_log = logging.getLogger(__name__)


def hint(conn: sa.Connection) -> None:
    """Wake the supervisors once this transaction commits."""
    if conn.dialect.name == "postgresql":
        conn.execute(_NOTIFY)
    elif (data := _data_folder(conn.engine)) is not None:
        folder = socket_folder(data)
        cast("Committed", conn.connection.driver_connection).after_commit[folder] = partial(_send, folder)


def _data_folder(engine: sa.Engine) -> Path | None:
    database = engine.url.database
    return Path(database).resolve().parent if database and database != ":memory:" else None


def _send(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(0)
        for path in folder.glob("wake-*"):
            try:
                sender.sendto(b"", str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)  # its supervisor was killed
            except OSError:  # a full queue: that supervisor has a hint waiting already
                continue


class Listener:
    """Receives hints; `fileno()` can be selected on.

    A listener that cannot be opened or was cut off waits for nobody: `fileno()` is None, and the next `open()` tries
    again.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._socket: socket.socket | None = None
        self._path: Path | None = None
        self._connection: psycopg.Connection | None = None
        self._again_at = 0.0

    def open(self) -> None:
        """Listen, unless this already does or failed to a moment ago; a failure is logged and left to a later call."""
        if self.fileno() is not None or time.monotonic() < self._again_at:
            return
        self.close()
        try:
            if self._engine.dialect.name == "postgresql":
                url = self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
                self._connection = TimedConnection.connect(url, autocommit=True, **LINK)
                self._connection.execute(f"LISTEN {CHANNEL}")
            elif (data := _data_folder(self._engine)) is not None:
                self._path = make_socket_folder(data) / f"wake-{os.getpid()}-{uuid.uuid4().hex[:8]}"
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.settimeout(0)
                self._socket.bind(str(self._path))
                self._path.chmod(0o600)
        except (psycopg.Error, OSError) as error:
            _log.warning("no wake-up hints, polling only: %s", error)
            self._again_at = time.monotonic() + _PAUSE_S
            self.close()

    def fileno(self) -> int | None:
        """Return the descriptor that becomes readable with a hint."""
        if self._connection is not None and not self._connection.closed:
            return self._connection.fileno()
        return self._socket.fileno() if self._socket is not None else None

    def drain(self) -> None:
        """Forget the hints received so far; a connection that was cut is closed."""
        if self._connection is not None:
            try:
                for _ in self._connection.notifies(timeout=0):
                    pass
            except psycopg.Error as error:
                _log.warning("the listening connection was cut: %s", error)
                self.close()
        elif self._socket is not None:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._socket.recv(16)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a hint and forget it; return whether one came."""
        descriptor = self.fileno()
        if descriptor is None:
            return False
        readable, _, _ = select.select([descriptor], [], [], timeout_s)
        if readable:
            self.drain()
        return bool(readable)

    def close(self) -> None:
        """Stop listening."""
        if self._connection is not None:
            self._connection.close()
        if self._socket is not None:
            self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            if (data := _data_folder(self._engine)) is not None:
                leave_socket_folder(data)
        self._connection = self._socket = self._path = None
