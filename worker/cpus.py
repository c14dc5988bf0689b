"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_V2: Final = Path("/sys/fs/cgroup/cpu.max")


def num_cpus() -> int:
    """Return the CPUs of the affinity mask or the cgroup's quota, whichever is less, at least one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(affinity, _quota())))


def _quota() -> float:
    if _V2.exists():
        quota, period = _V2.read_text(encoding="ascii").split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    return float("inf")
