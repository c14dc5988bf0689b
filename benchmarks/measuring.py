"""What our measurements have in common: peers in processes of their own, tables, intervals and bars."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np

ROOT: Final = Path(__file__).resolve().parents[1]


@final
class Process:
    """A process that does as it is told: a module of ours that answers each line of JSON with one."""

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, **command: Any) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """Receive an answer."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self._process.args} ended"
        return json.loads(line)

    def ask(self, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        self.say(**command)
        return self.hear()

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._process.kill()
        self._process.communicate()


@final
class Report:
    """Prints rows, and remembers whether a bar was missed."""

    def __init__(self) -> None:
        self.missed = 0

    def head(self, title: str, *columns: str) -> None:
        """Begin a table."""
        print(f"\n{title:<48}" + "".join(f"{column:>12}" for column in columns))

    def row(self, name: str, *cells: str) -> None:
        """Print a row."""
        print(f"{name:<48}" + "".join(f"{cell:>12}" for cell in cells), flush=True)

    def bar(self, name: str, found: tuple[float, float, float], *, least: float = 0, most: float = 0) -> None:
        """Hold a figure's interval against its bar, which it must keep with its worse end."""
        middle, low, high = found
        passed = low >= least if least else high <= most
        limit = f">= {least:g}" if least else f"<= {most:g}"
        self.missed += not passed
        print(
            f"  {name:<62}{middle:>8.3g} [{low:.3g}, {high:.3g}]  {limit:>7}  {'pass' if passed else 'MISSED'}",
            flush=True,
        )

    def told(self, name: str, found: tuple[float, float, float]) -> None:
        """Print a figure that has no bar."""
        middle, low, high = found
        print(f"  {name:<62}{middle:>8.3g} [{low:.3g}, {high:.3g}]", flush=True)

    def end(self) -> None:
        """Say whether every bar held; the exit status is 1 if one did not."""
        print(f"\n{self.missed} bars missed" if self.missed else "\nevery bar held")
        sys.exit(self.missed > 0)


def interval(values: Sequence[float], over: Sequence[float] | None = None) -> tuple[float, float, float]:
    """Return a median, or the ratio of two, with its bootstrap 95 % interval over rounds drawn pairwise."""
    rng = np.random.default_rng(0)
    a = np.array(values)
    b = np.ones(len(a)) if over is None else np.array(over)
    at = rng.integers(0, len(a), (4000, len(a)))
    low, high = np.quantile(np.median(a[at], axis=1) / np.median(b[at], axis=1), [0.025, 0.975])
    return float(np.median(a) / np.median(b)), float(low), float(high)
