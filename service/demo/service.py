"""A service of the demo's own: `isthmus serve` in a folder, on a free port, gone when the demo is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Final

from service.demo.client import DemoError
from service.serve import die_with

START_S: Final = 60.0
STOP_S: Final = 40.0
LOG: Final = "service.log"
_KEPT: Final = frozenset({"ISTHMUS_DEVICE"})


@contextlib.contextmanager
def own_service(folder: Path) -> Generator[str]:
    """Start a service that keeps everything in `folder`, yield its URL, stop it and all its processes.

    Raises DemoError with the service's last lines if it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / LOG
    # Settings of another service (its database, its keys) must not reach this one.
    environment = {
        name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith("ISTHMUS_")
    }
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-P", "-m", "service.cli", "serve", "--port", "0", "--data", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the demo, which then stops this in its own time
            preexec_fn=die_with(os.getpid()),  # noqa: PLW1509  # no thread runs yet
        )
    try:
        yield _await_url(process, folder / "serve.json", log)
    finally:
        _end(process)


def _await_url(process: subprocess.Popen[bytes], place: Path, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):  # not there yet, or not yet written
            about = json.loads(place.read_text())
            if about["pid"] == process.pid:
                return str(about["url"])
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    msg = f"the service did not start; the end of {log}:\n{tail}"
    raise DemoError(msg)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGTERM)  # the second one kills what is left
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
