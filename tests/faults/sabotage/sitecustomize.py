"""Loaded by every Python process of a sabotaged worker, before anything else: this folder stands first in PYTHONPATH.

A runner's ingest jobs become those of `odd_jobs.py` where their source asks for it. A supervisor with
`ISTHMUS_SABOTAGE` kills itself: `claimed`, right after its first claim; `published`, when a job's artifact is in the
store and its completion is about to be written.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

INGEST = "worker.jobs.ingest"


class OddJobs(MetaPathFinder):
    """Finds the odd jobs where ingest is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module to load instead."""
        if fullname != INGEST:
            return None
        return importlib.util.spec_from_file_location(fullname, Path(__file__).parents[1] / "odd_jobs.py")


def die(*_: Any, **__: Any) -> NoReturn:
    """Die as by the kernel's hand."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def arrange(moment: str) -> None:
    """Let this supervisor die at a moment."""
    from service.contract import outcomes
    from worker.slot import Slot

    match moment:
        case "claimed":
            Slot.start = die
        case "published":
            outcomes.finish = die
        case _:
            raise ValueError(moment)


if "worker.runner" in sys.orig_argv:
    sys.meta_path.insert(0, OddJobs())
elif sys.orig_argv[-2:] == ["-m", "worker"] and "ISTHMUS_SABOTAGE" in os.environ:
    arrange(os.environ["ISTHMUS_SABOTAGE"])
