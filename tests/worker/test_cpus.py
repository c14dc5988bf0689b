from __future__ import annotations

import math
from pathlib import Path

from worker.cpus import num_cpus, quota


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_quota_of_cgroup_v2_is_seen_and_that_of_every_group_above(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/worker\n",
        "sys/fs/cgroup/pod/worker/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
    }
    assert quota(write(tmp_path, files)) == 1.5


def test_a_quota_of_cgroup_v1_is_seen(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert quota(write(tmp_path, files)) == 2.5


def test_in_a_container_the_mount_shows_the_containers_own_group(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/0123\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}
    assert quota(write(tmp_path, files)) == 0.5


def test_without_a_quota_there_is_no_limit_and_never_less_than_one_cpu(tmp_path: Path) -> None:
    assert quota(tmp_path) == math.inf
    assert quota(write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})) == math.inf
    assert num_cpus() >= 1
