"""A job without a service: the worker's runner as a process of ours, its files in a folder that goes with it.

For jobs that read nothing. The runner ends with this process, however that ends: its standard input closes, and where
the system can do it the kernel kills it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from service.client.api import ApiError

EPOCH: Final = 1
TAIL_LINES: Final = 12
NEEDED: Final = ("worker", "torch", "matplotlib")


def run_here(args: BaseModel, job: str, folder: Path, advance: Callable[[float, float, float], None]) -> dict[str, Any]:
    """Run a job and return its result; its artifacts lie in `folder / "store"`.

    `advance` is called with what is done, the total and the seconds that are left. Raises ApiError if the job fails or
    cannot be run here.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        msg = f"without a service this needs {', '.join(missing)}: pip install 'isthmus[worker]', or name a service"
        raise ApiError(msg)
    scratch = folder / "scratch" / job
    scratch.mkdir(parents=True)
    task: dict[str, Any] = {
        "job": job,
        "epoch": EPOCH,
        "attempt": 1,
        "args": args.model_dump(mode="json"),
        "inputs": {},
        "resume": [],
        "store_url": str(folder / "store"),
        "scratch": str(scratch),
        "device": "cpu",
        "threads": 1,
    }
    log = folder / "runner.log"
    last: dict[str, Any] = {}
    with _runner(log, task) as channel:
        for line in channel:
            last = json.loads(line)
            if "progress" in last:
                said = last["progress"]
                advance(said["done"], said["total"] or 0, said["eta_s"] or 0.0)
    match last:
        case {"done": result}:
            return result
        case {"failed": {"type": kind, "message": message}}:
            raise ApiError(f"{kind}: {message}")
        case _:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            raise ApiError(f"the runner ended without a word; its last lines:\n{tail}")


@contextlib.contextmanager
def _runner(log: Path, task: dict[str, Any]) -> Generator[Any]:
    """Start a runner, give it its task, yield what it says, and kill it with all its processes at the end."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-P", "-m", "worker.runner", "--channel", str(write_end), "--parent", str(os.getpid())]
    with os.fdopen(read_end, encoding="utf-8") as channel, log.open("wb") as out:
        try:
            process = subprocess.Popen(  # noqa: S603  # our own module
                command,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=(write_end,),
                start_new_session=True,  # Ctrl-C reaches this process alone, and the group dies together
            )
        finally:
            os.close(write_end)
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended already, and its log says why
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.flush()
            yield channel
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
