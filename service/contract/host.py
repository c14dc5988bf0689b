"""What a process knows about the machine under it: its boot, its names, and a private folder for sockets."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import stat
import tempfile
from pathlib import Path
from typing import Final

_MAX_SOCKET_PATH: Final = 103  # sun_path ends at 108 bytes on Linux and at 104 on macOS, with a NUL
_MAX_NAME: Final = 24


def boot_id() -> str:
    """Return the id of this boot of the host, shared by every container on it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else socket.gethostname()


def host_name() -> str:
    """Return the host's name with its process name space: within one, a process id means one process.

    Containers may share a host name and number their processes alike.
    """
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space.readlink()}" if space.is_symlink() else socket.gethostname()


def is_loopback(host: str) -> bool:
    """Tell whether an address to bind, or a name in a URL or a header, is this machine's own."""
    if host.lower() in {"localhost", "localhost."}:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def socket_folder(data: Path) -> Path:
    """Return the folder for sockets of at most 24 characters that belong to a data folder.

    It is `run` in the data folder, or, where that path is too long for a socket, a temporary folder named by the hash
    of the data folder. Every process of one owner finds the same folder; it may not exist.
    """
    data = data.resolve()
    folder = data / "run"
    if len(os.fsencode(folder)) + 1 + _MAX_NAME > _MAX_SOCKET_PATH:
        digest = hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"isthmus-{os.getuid()}-{digest}"
    return folder


def make_socket_folder(data: Path) -> Path:
    """Make the folder for sockets that belong to a data folder, readable by its owner only (0700).

    Raises PermissionError when it exists and belongs to somebody else.
    """
    folder = socket_folder(data)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        msg = f"{folder} belongs to somebody else"
        raise PermissionError(msg)
    folder.chmod(0o700)
    return folder


def leave_socket_folder(data: Path) -> None:
    """Remove the folder for sockets if nobody else's is in it."""
    with contextlib.suppress(OSError):
        socket_folder(data).rmdir()
