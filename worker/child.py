"""A runner process as the supervisor sees it: its control pipe, its channel, its end.

The control pipe is the runner's standard input (JSON lines: the job, later a cancel or an interrupt); end of file there
tells it that the supervisor is gone. The channel is a pipe of its own, so that a library that prints harms nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import Any, Final, final

MAX_LINE_BYTES: Final = 16 << 20
_READ_BYTES: Final = 1 << 16


class BrokenChannel(Exception):
    """The runner wrote something that is not a message."""


@final
class Child:
    """A runner, idle or at work, with its process group."""

    def __init__(self, *, preload: bool, environment: dict[str, str]) -> None:
        self._channel, write_end = os.pipe()
        os.set_blocking(self._channel, False)  # positional in the standard library
        command = [sys.executable, "-P", "-m", "worker.runner"]
        command += ["--channel", str(write_end), "--parent", str(os.getpid()), *(["--preload"] if preload else [])]
        try:
            # A session of its own: a terminal's Ctrl-C reaches the supervisor alone, and the group dies together.
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                pass_fds=(write_end,),
                start_new_session=True,
                env=environment,
            )
        except OSError:
            os.close(self._channel)
            raise
        finally:
            os.close(write_end)
        self._buffer = bytearray()
        self._ended = False
        self._is_group_gone = False

    @property
    def pid(self) -> int:
        """The process's id, which is also its group's."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the channel reached its end: no message will come."""
        return self._ended

    def fileno(self) -> int:
        """Return the channel, to be selected on."""
        return self._channel

    def send(self, message: dict[str, Any]) -> None:
        """Write a control line; a runner that is gone is found out by its exit."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def messages(self) -> list[dict[str, Any]]:
        """Read the messages that have come.

        Raises BrokenChannel for a line that is too long or not a JSON object.
        """
        while not self._ended:
            try:
                data = os.read(self._channel, _READ_BYTES)
            except BlockingIOError:
                break
            self._buffer += data
            self._ended = not data
            if len(self._buffer) > MAX_LINE_BYTES:
                break
        *lines, rest = bytes(self._buffer).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            msg = f"the runner wrote a message of more than {MAX_LINE_BYTES:,} bytes"
            raise BrokenChannel(msg)
        self._buffer = bytearray(rest)
        found: list[dict[str, Any]] = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError as error:
                msg = "the runner wrote a line that is not JSON"
                raise BrokenChannel(msg) from error
            if not isinstance(message, dict):
                msg = "the runner wrote a line that is not a message"
                raise BrokenChannel(msg)
            found.append(message)
        return found

    def exit_status(self) -> int | None:
        """Return the exit status once the process ended, negative for a signal; its group is killed with it."""
        status = self._process.poll()
        if status is not None:
            self._kill_group()
        return status

    def kill(self) -> None:
        """Kill the runner and everything it started."""
        self._kill_group()

    def close(self) -> None:
        """Kill what is left, wait for it and close the pipes."""
        self._kill_group()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        os.close(self._channel)

    def _kill_group(self) -> None:
        # Once: when the process was waited for and its group is dead, the number may be somebody else's.
        if self._is_group_gone:
            return
        self._is_group_gone = self._process.returncode is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def ending(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
