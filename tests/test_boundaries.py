"""Arrows only point at the contract: what a process loads is what its image must contain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""


def modules_of(package: str, *, without: tuple[str, ...] = ()) -> list[str]:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / package).rglob("*.py"))]
    plain = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    return [name for name in plain if not name.startswith(without)] if without else plain


def loaded_by(names: list[str]) -> set[str]:
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("names", "forbidden"),
    [
        (["service.app"], ["torch", "transformers", "huggingface_hub", "pyarrow", "worker", "sklearn"]),
        (
            modules_of("service", without=("service.demo", "service.contract")),
            ["torch", "transformers", "huggingface_hub", "pyarrow", "worker", "sklearn"],
        ),
        (
            modules_of("service/contract"),
            ["torch", "transformers", "pyarrow", "worker", "fastapi", "starlette", "service.app", "service.routes"],
        ),
        (
            modules_of("worker"),
            ["fastapi", "service.app", "service.routes", "service.deps", "service.inference.gateway"],
        ),
        (["worker.supervisor"], ["torch", "fastapi", "pyarrow"]),
        (["worker.loader"], ["torch", "fastapi", "pyarrow", "sqlalchemy"]),
    ],
    ids=["the application", "service", "the contract", "worker", "the supervisor", "a loader"],
)
def test_a_side_never_loads_the_other(names: list[str], forbidden: list[str]) -> None:
    loaded = loaded_by(names)
    assert not [name for name in forbidden if name in loaded]


def test_ingest_never_loads_torch() -> None:
    assert "torch" not in loaded_by(["worker.jobs.ingest"])
