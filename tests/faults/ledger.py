"""What workers of the tests did, in a file that outlives them: one line per start and per end, appended whole."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

What = Literal["start", "finish", "refused", "dead"]
"""`finish`: the result was stored; `refused`: it came too late; `dead`: the worker learned that it was given up."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger."""

    what: str
    job: str
    epoch: int
    attempt: int
    pid: int


class Ledger:
    """An append-only file that any number of processes write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, what: What, job: str = "-", epoch: int = 0, attempt: int = 0) -> None:
        """Append a line."""
        os.write(self._descriptor, f"{what} {job} {epoch} {attempt} {os.getpid()}\n".encode())

    def read(self, *what: What) -> list[Entry]:
        """Read the lines of these sorts, of all by default."""
        lines = [line.split() for line in self.path.read_text().splitlines()]
        found = [Entry(line[0], line[1], int(line[2]), int(line[3]), int(line[4])) for line in lines]
        return [entry for entry in found if not what or entry.what in what]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
