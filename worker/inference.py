"""The inference process as the supervisor sees it: where it listens, and that it is running."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, final

from service.contract.host import is_loopback, leave_socket_folder, make_socket_folder
from service.contract.settings import Settings
from worker.child import ending

_log = logging.getLogger(__name__)
_SETTLED_S: Final = 60.0  # one that ran this long is started again at once
_MAX_PAUSE_S: Final = 30.0
_TOKEN: Final = "ISTHMUS_WORKER_TOKEN"  # noqa: S105  # the variable's name
_STALE_S: Final = 60.0


@final
class Inference:
    """A child that serves models, started again when it ends."""

    def __init__(self, settings: Settings, *, environment: dict[str, str], num_threads: int) -> None:
        self.listen, self.endpoint = endpoints(settings)
        self._settings = settings
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._controls: dict[str, Any] = {"threads": num_threads}
        self._began = 0.0
        self._quick_deaths = 0
        self._start_at = 0.0

    def keep(self) -> None:
        """Start the process if it is not running, after a pause if it keeps dying."""
        now = time.monotonic()
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return
            self._close()
            self._quick_deaths = 0 if now - self._began > _SETTLED_S else self._quick_deaths + 1
            pause_s = min(_MAX_PAUSE_S, 0.5 * 2 ** (self._quick_deaths - 1)) if self._quick_deaths else 0.0
            self._start_at = now + pause_s
            fields = {"ending": ending(status), "starts_again_in_s": pause_s}
            _log.error("the inference process ended", extra={"fields": fields})
        if now >= self._start_at:
            self._start()

    def control(self, name: str, value: float) -> None:
        """Set a control such as `threads`; a process that is started again gets it too."""
        if self._controls.get(name) != value:
            self._controls[name] = value
            self._send({name: value})

    def stop(self, grace_s: float) -> None:
        """End the process: ask, wait, kill."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
            self._close()
        if self.listen.startswith("unix:"):
            Path(self.listen.removeprefix("unix:")).unlink(missing_ok=True)
            leave_socket_folder(self._settings.data)

    def _start(self) -> None:
        settings = self._settings
        command = [sys.executable, "-P", "-m", "worker.serving", "--endpoint", self.listen]
        command += ["--store", settings.resolved_store_url(), "--device", settings.device]
        command += ["--threads", str(self._controls["threads"])]
        environment = dict(self._environment)
        if settings.worker_token is not None and not self.listen.startswith("unix:"):
            environment[_TOKEN] = settings.worker_token.get_secret_value()
            command += ["--token-env", _TOKEN]
        self._began = time.monotonic()
        try:
            if self.listen.startswith("unix:"):
                make_socket_folder(settings.data)  # another worker that stopped meanwhile may have removed it, empty
            self._process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=sys.stderr.fileno(), start_new_session=True, env=environment
            )
        except OSError as error:
            self._start_at = self._began + _MAX_PAUSE_S
            fields = {"error": str(error), "again_in_s": _MAX_PAUSE_S}
            _log.error("the inference process cannot be started", extra={"fields": fields})
            return
        _log.info("inference started", extra={"fields": {"pid": self._process.pid, "endpoint": self.endpoint}})
        for name, value in self._controls.items():
            self._send({name: value})

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError, ValueError):
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()

    def _close(self) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process = None


def endpoints(settings: Settings) -> tuple[str, str]:
    """Return where the inference process listens, and what the API is told.

    Raises ValueError for an address that other hosts reach without a token, or that no host can be told.
    """
    if settings.worker_listen is None:
        folder = make_socket_folder(settings.data)
        _sweep(folder)
        endpoint = f"unix:{folder / f'serve-{secrets.token_hex(4)}.sock'}"
        return endpoint, endpoint
    host, colon, port = settings.worker_listen.rpartition(":")
    if not colon or not port.isdigit():
        msg = f"ISTHMUS_WORKER_LISTEN: {settings.worker_listen} is not host:port"
        raise ValueError(msg)
    name = host.strip("[]")
    if not is_loopback(name) and settings.worker_token is None:
        msg = "ISTHMUS_WORKER_LISTEN: an address that other hosts reach needs ISTHMUS_WORKER_TOKEN"
        raise ValueError(msg)
    if settings.worker_advertise is not None:
        return settings.worker_listen, settings.worker_advertise.rstrip("/")
    if port == "0":
        msg = "ISTHMUS_WORKER_ADVERTISE: no API can be told to reach this worker at " + settings.worker_listen
        raise ValueError(msg)
    if name in ("", "0.0.0.0", "::"):  # noqa: S104  # compared, not bound
        # Under compose and in most networks a host is known by its name, so every replica has one of its own.
        return settings.worker_listen, f"http://{socket.gethostname()}:{port}"
    return settings.worker_listen, f"http://{settings.worker_listen}"


def _sweep(folder: Path) -> None:
    # Sockets whose process was killed; a young one may be bound and not listening yet.
    for path in folder.glob("serve-*.sock"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            if time.time() - path.stat().st_mtime < _STALE_S:
                continue
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
