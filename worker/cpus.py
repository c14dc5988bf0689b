"""How many CPUs this process may use."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path, PurePosixPath


def num_cpus() -> int:
    """Return the CPUs of the affinity mask or the cgroups' quota, whichever is less, at least one."""
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, int(min(affinity, quota(Path("/")))))


def quota(root: Path) -> float:
    """Return the CPUs that this process's cgroups allow, version 1 or 2; infinity if none of them sets a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return math.inf
    least = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        own = PurePosixPath(path.lstrip("/"))
        # The limit of any cgroup above holds too. In a container only the mount itself may be there to be seen.
        least = min(least, *(_limit(mount / folder) for folder in (own, *own.parents)))
    return least


def _limit(folder: Path) -> float:
    try:
        if (file := folder / "cpu.max").exists():
            most, period = file.read_text(encoding="ascii").split()
        else:
            most = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
    except OSError:
        return math.inf
    return math.inf if most in {"max", "-1"} else int(most) / int(period)
