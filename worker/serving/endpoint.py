"""Where the inference process listens: a unix socket for its owner alone, or TCP behind a token."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final, cast

from service.contract.host import is_loopback

UNIX: Final = "unix:"
BACKLOG: Final = 2048
MAX_PORT: Final = 65_535


class BadEndpoint(Exception):
    """Say why an endpoint cannot be served."""


@contextlib.contextmanager
def listen(endpoint: str, token: str | None) -> Generator[socket.socket]:
    """Listen at `unix:/path` or `host:port` and yield the socket; a unix socket's file goes at the end.

    Raises BadEndpoint if it cannot be bound, or could be reached from other machines without a token.
    """
    if endpoint.startswith(UNIX):
        with _listen_unix(Path(endpoint.removeprefix(UNIX))) as sock:
            yield sock
        return
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > MAX_PORT:
        msg = f"{endpoint!r} is neither unix:/path nor host:port"
        raise BadEndpoint(msg)
    if token is None and not is_loopback(host):
        msg = f"{host} can be reached from other machines: set ISTHMUS_WORKER_TOKEN, or listen on 127.0.0.1"
        raise BadEndpoint(msg)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(cast("Any", address))
            sock.listen(BACKLOG)
            yield sock
    except OSError as error:
        msg = f"{endpoint} cannot be bound: {error.strerror}"
        raise BadEndpoint(msg) from error


@contextlib.contextmanager
def _listen_unix(path: Path) -> Generator[socket.socket]:
    # Bound here and not by uvicorn, which opens the socket's mode to everybody.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        except OSError as error:
            msg = f"{path} cannot be bound: {error.strerror or error}"
            raise BadEndpoint(msg) from error
        finally:
            os.umask(mask)
        sock.listen(BACKLOG)
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        msg = f"{path} is there already, and is no socket"
        raise BadEndpoint(msg)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # its owner was killed
            return
    msg = f"another process listens on {path}"
    raise BadEndpoint(msg)
