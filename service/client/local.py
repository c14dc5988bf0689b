"""Jobs without a service: the worker's runner as processes of ours, their files in a folder that goes with them.

For jobs that read nothing. A runner ends with this process, however that ends: its standard input closes, and where the
system can do it the kernel kills it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, final

from pydantic import BaseModel

from service.client.api import ApiError

EPOCH: Final = 1
TAIL_LINES: Final = 12
NEEDED: Final = ("worker", "torch", "matplotlib")
_READ_BYTES: Final = 1 << 16


@final
@dataclass(frozen=True)
class Work:
    """A job, and the name that it and its files go by here."""

    name: str
    args: BaseModel


def run_here(
    work: Sequence[Work], folder: Path, at_once: int, advance: Callable[[str, int, int], None]
) -> Generator[tuple[str, dict[str, Any]]]:
    """Run jobs, some at once, and yield the name and the result of each as it ends.

    Artifacts lie in `folder / "store"`. `advance` is called with the name of a job, what is done and the total. Raises
    ApiError if a job fails or none can be run here; the others are killed then.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        msg = f"without a service this needs {', '.join(missing)}: pip install 'isthmus[worker]', or name a service"
        raise ApiError(msg)
    waiting = deque(work)
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        while waiting or selector.get_map():
            while waiting and len(selector.get_map()) < at_once:
                runner = stack.enter_context(contextlib.closing(_Runner(waiting.popleft(), folder)))
                selector.register(runner.channel, selectors.EVENT_READ, runner)
            for key, _ in selector.select():
                runner = key.data
                assert isinstance(runner, _Runner)
                for message in runner.messages():
                    if "progress" in message:
                        advance(runner.name, message["progress"]["done"], message["progress"]["total"] or 0)
                if runner.ended:
                    selector.unregister(runner.channel)
                    yield runner.name, runner.result()


@final
class _Runner:
    """A runner process with one job."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.name = work.name
        self.ended = False
        self._last: dict[str, Any] = {}
        self._rest = b""
        self._log = folder / f"{work.name}.log"
        scratch = folder / "scratch" / work.name
        scratch.mkdir(parents=True)
        task: dict[str, Any] = {
            "job": f"job_{work.name}",
            "epoch": EPOCH,
            "attempt": 1,
            "args": work.args.model_dump(mode="json"),
            "inputs": {},
            "resume": [],
            "store_url": str(folder / "store"),
            "scratch": str(scratch),
            "device": "cpu",
            "threads": 1,
        }
        self.channel, write_end = os.pipe()
        command = [sys.executable, "-P", "-m", "worker.runner", "--channel", str(write_end)]
        try:
            with self._log.open("wb") as out:
                self._process = subprocess.Popen(  # noqa: S603  # our own module
                    [*command, "--parent", str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_end,),
                    start_new_session=True,  # Ctrl-C reaches this process alone, and the group dies together
                )
        except OSError:
            os.close(self.channel)
            raise
        finally:
            os.close(write_end)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already, and its log says why
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()

    def messages(self) -> list[dict[str, Any]]:
        """Read what has come; there is something, or the end."""
        data = os.read(self.channel, _READ_BYTES)
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = [json.loads(line) for line in lines]
        self._last = found[-1] if found else self._last
        return found

    def result(self) -> dict[str, Any]:
        """Return the result of a runner that has ended.

        Raises ApiError with what went wrong.
        """
        match self._last:
            case {"done": result}:
                return result
            case {"failed": {"type": kind, "message": message}}:
                msg = f"{self.name}: {kind}: {message}"
            case _:
                tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
                msg = f"{self.name}: the runner ended without a word; its last lines:\n{tail}"
        raise ApiError(msg)

    def close(self) -> None:
        """Kill it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self.channel)
