"""What a process knows about the machine under it: its boot, its names, and a private folder for sockets."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import re
import socket
import stat
import tempfile
from pathlib import Path
from typing import Final

_MAX_SOCKET_PATH: Final = 103  # sun_path ends at 108 bytes on Linux and at 104 on macOS, with a NUL
_MAX_NAME: Final = 24
_MOUNTS: Final = Path("/proc/self/mountinfo")
_NETWORKED: Final = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"}
    | {"ocfs2", "orangefs", "smb3", "smbfs", "virtiofs"}
)
_NETWORKED_FUSE: Final = frozenset(
    {"ceph-fuse", "davfs", "gcsfuse", "glusterfs", "grpcfuse", "juicefs", "moosefs", "osxfs", "rclone", "s3fs"}
    | {"smbnetfs", "sshfs"}
)


def boot_id() -> str:
    """Return the id of this boot of the host, shared by every container on it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else socket.gethostname()


def network_file_system(path: Path, mounts: str | None = None) -> str | None:
    """Return the type of the network file system on which a path lies, or None if it lies on this machine.

    `mounts` is what /proc/self/mountinfo says; without one (macOS) nothing is known, and the answer is None.
    """
    if mounts is None:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape") if _MOUNTS.exists() else ""
    at = path.resolve()
    best, found = -1, ""
    for line in mounts.splitlines():
        # 36 35 98:0 /mnt1 /mnt/parent rw,noatime master:1 - ext3 /dev/root rw,errors=continue: see proc(5)
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        # Spaces and the like are written in octal. A later mount on the same point hides the earlier one.
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if at.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), after.split(" ")[0]
    kind, _, program = found.partition(".")
    networked = program in _NETWORKED_FUSE if kind.startswith("fuse") else found in _NETWORKED
    return found if networked else None


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
