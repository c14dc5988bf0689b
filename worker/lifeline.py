"""A child never outlives its supervisor: what a process that the supervisor starts does first."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when the thread of `parent` (default: the present one) that started it ends.

    Linux only; elsewhere the end of the control pipe has to do.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)  # it ended before we could ask
