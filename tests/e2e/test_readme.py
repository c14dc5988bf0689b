"""The README's tour, pasted line by line into a shell beside a running service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOUR = re.compile(r"## Five minutes.*?(?=\n## )", re.DOTALL)
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)


@pytest.mark.slow
def test_the_tour_works_pasted_line_by_line(serve: Any, tmp_path: Path) -> None:
    tour = TOUR.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert tour is not None
    lines = "\n".join(BLOCK.findall(tour[0])).splitlines()
    lines = [line for line in lines if line != "make serve" and "pip install" not in line]  # both are done
    with serve(tmp_path / "data") as running:
        # Here the programs are elsewhere, and so is the port.
        script = "\n".join(lines).replace("http://127.0.0.1:8000", running.url)
        script = script.replace(".venv/bin/", f"{Path(sys.executable).parent}/").replace("docs/", f"{ROOT}/docs/")
        environment = os.environ | {"ISTHMUS_URL": running.url, "PYTHONPATH": str(ROOT)}
        command = ["bash", "-eu"]
        done = subprocess.run(
            command, input=script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        models = running.get("/v1/models")["data"]
    assert '"status":"ready"' in done.stdout.replace(" ", "")
    assert "event: done" in done.stdout
    assert len(models) == 1
    assert "the sound of seven: seven" in done.stdout
    assert done.stdout.count("posterior") == 5
    assert done.stdout.count("the same both ways: True") == 2
