"""What the worker processes of `benchmarks/queue.py` have in common: a queue to fill and drain, on command.

A process reads one JSON command a line and answers each with one JSON line. What is measured runs between "ready" and
"drained", so interpreter start, imports and connecting are outside. The clock is the monotonic one, which all processes
of a machine share.
"""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from typing import Any, final


@final
class Ran:
    """The jobs of one drain: how many, and when the last one ran."""

    def __init__(self) -> None:
        self.num = 0
        self.last = 0.0

    def no_op(self) -> None:
        """Do what every job does."""
        self.num += 1
        self.last = time.monotonic()


class System(ABC):
    """A queue whose jobs do nothing."""

    @abstractmethod
    async def install(self) -> None:
        """Make the tables."""

    @abstractmethod
    async def fill(self, num: int) -> None:
        """Empty the tables and add that many jobs."""

    @abstractmethod
    async def prepare(self) -> None:
        """Connect for the drain that follows."""

    @abstractmethod
    async def drain(self, size: int, ran: Ran) -> None:
        """Run jobs until none is left; `size` is the batch, or how many at a time."""

    async def obey(self, command: str, **how: Any) -> dict[str, Any]:
        """Do what only some systems can; raises ValueError for what this one cannot."""
        raise ValueError(command, how)


def answer(value: dict[str, Any]) -> None:
    """Write a line."""
    print(json.dumps(value), flush=True)


async def serve(system: System) -> None:
    """Obey commands until there are none."""
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        match command.pop("do"):
            case "install":
                await system.install()
                answer({})
            case "fill":
                await system.fill(**command)
                answer({})
            case "drain":
                await system.prepare()
                ran = Ran()
                answer({"ready": True})
                sys.stdin.readline()
                began, cpu = time.monotonic(), time.process_time()
                await system.drain(ran=ran, **command)
                answer({"num": ran.num, "began": began, "last": ran.last, "cpu_s": time.process_time() - cpu})
            case other:
                answer(await system.obey(other, **command))
