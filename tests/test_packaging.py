"""The wheel: every package named, and everything in it that is no module."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_named() -> None:
    folders = [
        path.parent.relative_to(ROOT) for side in ("service", "worker") for path in (ROOT / side).rglob("__init__.py")
    ]
    found = {".".join(folder.parts) for folder in folders} | {"service.migrations", "service.migrations.versions"}
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(named) == sorted(found)


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for side in ("service", "worker") for path in (ROOT / side).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel that was built from a copy of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("service", "worker", "migrations"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_a_wheel_holds_every_module(wheel: set[str]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix() for side in ("service", "worker") for path in (ROOT / side).rglob("*.py")
    }
    wanted |= {f"service/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "migrations").rglob("*.py")}
    assert {name for name in wheel if name.endswith(".py")} == wanted
    assert any(name.startswith("service/migrations/versions/0001") for name in wanted)


def test_a_wheel_holds_the_page_of_the_demo_and_the_licence(wheel: set[str]) -> None:
    assert "service/demo/page.html" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_a_wheel_holds_two_packages_and_nothing_else(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"service", "worker"}
