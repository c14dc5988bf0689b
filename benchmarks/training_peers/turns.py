"""One turn of a peer of `benchmarks/training.py`: so many steps on command, and what they cost.

CPU time is that of the whole process, all threads. A loop that prepares batches ahead has done so before a turn begins
and again before it ends, so each turn pays for as many batches as it takes.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Final, final

_STILL_S: Final = 0.1
_STATUS: Final = Path("/proc/self/status")


def answer(value: dict[str, Any]) -> None:
    """Write a line."""
    print(json.dumps(value), flush=True)


def asked() -> dict[str, Any]:
    """Wait for the next command; without anybody to give one the process ends."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return json.loads(line)


@final
class Turns:
    """The commands of one peer that trains."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._began_cpu_s = self._began_s = 0.0

    def begin(self) -> int:
        """Wait to be told how many steps to take, and return that."""
        self.num_steps = asked()["steps"]
        forget_peak()
        self._began_cpu_s, self._began_s = time.process_time(), time.monotonic()
        return self.num_steps

    def end(self, num_samples: int, loss: float) -> None:
        """Tell what the steps cost; the loss is the mean since the job's last look."""
        wall_s = time.monotonic() - self._began_s
        _be_still()
        cpu_s = time.process_time() - self._began_cpu_s
        peak_bytes = peak()
        answer({"cpu_ms": 1000 * cpu_s / num_samples, "rate": num_samples / wall_s, "peak": peak_bytes, "loss": loss})


def _be_still() -> None:
    """Wait until no other thread has anything left to do."""
    before = time.process_time()
    while True:
        time.sleep(_STILL_S)
        now = time.process_time()
        if now - before < _STILL_S / 50:
            return
        before = now


def forget_peak() -> None:
    """Let the peak of the memory be counted from now on, where the system can; memory that is free goes back first."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> int:
    """Return the most resident memory since `forget_peak`, or ever; bytes."""
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident() -> int:
    """Return the resident memory, or the most that there ever was; bytes."""
    return _status("VmRSS") if sys.platform == "linux" else peak()


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])
