"""The demo as a newcomer runs it: three seeds, and their mean against the bars."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from service.demo.figures import BARS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SINGLE: float = 0.03  # what one run may fall short


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "service.cli", "demo", *arguments]


def test_the_mean_of_three_seeds_clears_every_bar(tmp_path: Path) -> None:
    found: dict[str, list[float]] = {name: [] for name in BARS}
    for seed in range(3):
        began = time.monotonic()
        done = subprocess.run(
            command("--seed", str(seed), "--out", str(tmp_path)), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert time.monotonic() - began < 300
        reached = [float(value) for value in re.findall(r"^  \w.*?  +(\d\.\d{3})  ", done.stdout, re.MULTILINE)]
        for (name, bar), value in zip(BARS.items(), reached, strict=True):
            found[name].append(value)
            assert value >= bar - SINGLE
    for name, bar in BARS.items():
        assert sum(found[name]) / len(found[name]) >= bar, found


@pytest.mark.parametrize("moment", ["1. data", "2. service", "learning"])
def test_an_interrupted_demo_leaves_nothing_running(moment: str, tmp_path: Path) -> None:
    with subprocess.Popen(
        command("--out", str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if moment in line:
                break
        family = psutil.Process(demo.pid).children(recursive=True)
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does it
        rest = demo.stdout.read()
        assert demo.wait(60) == 130, rest
    assert "Traceback" not in rest
    assert not psutil.wait_procs(family, timeout=5)[1]
    assert not list(tmp_path.iterdir())
