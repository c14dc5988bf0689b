"""The examples of `docs/examples` that learn from a folder of data: in a tiny form, and (slow) as a user runs them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from service.contract.recipe import Recipe
from tests.e2e.conftest import DIGITS, picture, sound

ROOT = Path(__file__).resolve().parents[2]
TOGETHER = ROOT / "docs" / "examples" / "spoken-digits"
APART = ROOT / "docs" / "examples" / "separate-models"
REAL_DATA = "ISTHMUS_SPOKEN_DIGITS"  # names the folder of the real recordings and images
SPEAKERS = ("ann", "bob", "eve", "ida")


def write_tar(path: Path, samples: dict[str, tuple[str, bytes, int]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (extension, content, digit) in samples.items():
            for kind, part in (
                (extension, content),
                ("txt", f"the digit {DIGITS[digit]}".encode()),
                ("cls", b"%d" % digit),
            ):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size = len(part)
                tar.addfile(member, io.BytesIO(part))


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Make a few images and recordings, laid out and named as the real ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "digits"
    folder.mkdir()
    for part, num in (("train", 24), ("test", 12)):
        images = {f"{part}-{at:05d}": ("png", picture(at % 6, rng), at % 6) for at in range(num)}
        write_tar(folder / f"image-text-{part}.tar", images)
        recordings = {
            f"{digit}_{speaker}_{number + 100 * (part == 'train')}": ("wav", sound(digit, rng), digit)
            for digit in range(6)
            for speaker in SPEAKERS
            for number in range(num // 12)
        }
        write_tar(folder / f"audio-text-{part}.tar", recordings)
    return folder


def shrink_into(folder: Path, **text: Any) -> None:
    """Write the recipes of the models apart as they shrink; `text` is said of the text tokens of one of them."""
    for name, more in (("pictures", text), ("sounds", {})):
        recipe = shrink(read_recipe(APART / f"{name}.json"))
        recipe["towers"]["text"]["tokens"] |= more
        (folder / f"{name}.json").write_text(json.dumps(recipe))


def shrink(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with all that it says, in a form that learns in a second, and little."""
    towers = {name: tower | {"width": 16, "depth": 1} for name, tower in recipe["towers"].items()}
    budget = recipe["budget"] | {"steps": 6, "batch_size": 8, "log_every": 2}
    return recipe | {"towers": towers, "budget": budget, "dimensions": 8, "bank": {"size": 16}}


def run(example: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, example / "run.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def read_recipe(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_recipe_never_joins_images_with_recordings() -> None:
    recipe = read_recipe(TOGETHER / "recipe.json")
    for pair in recipe["pairs"]:
        pair["dataset"] = f"ds_{pair['dataset'].split('-')[0]}"
    assert sorted(sorted(pair.modalities) for pair in Recipe.model_validate(recipe).pairs) == [
        ["audio", "text"],
        ["image", "text"],
    ]


def test_the_example_starts_a_service_of_its_own_and_measures_both_runs(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(shrink(read_recipe(TOGETHER / "recipe.json"))))
    (tmp_path / "scratch").mkdir()
    wanted = ["--recipe", tmp_path / "recipe.json", "--speaker", "bob", "--out", tmp_path / "found.json"]
    done = run(TOGETHER, digits, *wanted, TMPDIR=str(tmp_path / "scratch"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["spoken-digits", "spoken-digits-without-bob"]
    for each in found.values():
        assert each["figures"].keys() == {
            "images named",
            "recordings named",
            "recording -> images",
            "image -> recordings",
        }
        for name in ("recording -> images", "image -> recordings"):
            assert each["figures"][name].keys() == {"direct", "marginal"}
        assert all(0 <= value <= 1 for values in each["figures"].values() for value in values.values())
    assert "audio-text: 48 train, 24 holdout, 0 rejected" in done.stdout
    assert "audio-text: 54 train, 18 holdout, 0 rejected" in done.stdout
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(each.info["cmdline"])]
    assert not list((tmp_path / "scratch").glob("isthmus-*"))


def test_a_running_service_is_used_and_says_what_is_wrong_with_the_speaker(
    serve: Any, digits: Path, tmp_path: Path
) -> None:
    with serve(tmp_path / "data") as running:
        done = run(TOGETHER, digits, "--url", running.url, "--speaker", "nobody")
        assert len(running.get("/v1/datasets")["data"]) == 3
        assert not [job for job in running.get("/v1/jobs")["data"] if job["kind"] == "train"]
    assert done.returncode == 1
    assert "no good sample has 'nobody' as its 'speaker'; some have 'ann', 'bob', 'eve', 'ida'" in done.stderr


@pytest.mark.parametrize("example", [TOGETHER, APART], ids=["together", "apart"])
def test_a_folder_without_the_tars_is_refused_before_anything_starts(tmp_path: Path, example: Path) -> None:
    done = run(example, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"run.py: {tmp_path} has no image-text-train.tar\n"


def test_no_data_set_is_learned_from_by_both_models() -> None:
    recipes = [read_recipe(APART / f"{name}.json") for name in ("pictures", "sounds")]
    assert [sorted(recipe["towers"]) for recipe in recipes] == [["image", "text"], ["audio", "text"]]
    datasets = [{pair["dataset"] for pair in recipe["pairs"]} for recipe in recipes]
    assert datasets == [{"image-text-train"}, {"audio-text-train"}]
    for recipe in recipes:
        recipe["pairs"] = [pair | {"dataset": "ds_1"} for pair in recipe["pairs"]]
        Recipe.model_validate(recipe)


def test_models_that_were_trained_apart_are_refused_direct_and_composed(
    serve: Any, digits: Path, tmp_path: Path
) -> None:
    shrink_into(tmp_path)
    with serve(tmp_path / "data") as running:
        wanted = ["--url", running.url, "--recipes", tmp_path]
        done = run(APART, digits, *wanted, "--out", tmp_path / "found.json")
        shrink_into(tmp_path, method="bpe", vocab=280)
        other = run(APART, digits, *wanted)
    assert other.returncode == 1
    assert "the two models tokenise 'text' differently: give the bridge items with `through`" in other.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert "422 encoders_differ: the two models encode 'text' differently" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["refused"] == "encoders_differ"
    assert found["answer"]["diagnostics"]["bridge_size"] == 30
    assert found["ways"].keys() == {"recording -> images", "image -> recordings"}
    for rows in found["ways"].values():
        assert list(rows) == ["chance", "cosine", "banks", "sets", "list"]
        assert rows["chance"]["precision"] == pytest.approx(1 / 6)
        assert all(0 <= row["precision"] <= 1 for row in rows.values())
        # A posterior adds up to 1, so what is said of the likeliest of six digits is a sixth at least.
        assert all(1 / 6 - 1e-6 <= rows[name]["confidence"] <= 1 for name in ("banks", "sets"))
        assert 1 <= rows["list"]["effective_sample_size"] <= 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(REAL_DATA not in os.environ, reason=f"{REAL_DATA} does not name a folder")
def test_real_images_and_recordings_are_learned_to_every_bar(tmp_path: Path) -> None:
    done = run(TOGETHER, os.environ[REAL_DATA], "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    together, without = json.loads((tmp_path / "found.json").read_text()).values()
    assert together["figures"]["images named"]["zero-shot"] >= 0.97
    assert together["figures"]["recordings named"]["zero-shot"] >= 0.97
    assert min(together["figures"]["recording -> images"].values()) >= 0.96
    assert without["figures"]["images named"]["zero-shot"] >= 0.97


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(REAL_DATA not in os.environ, reason=f"{REAL_DATA} does not name a folder")
def test_models_of_real_images_and_of_recordings_compose_though_they_never_met(serve: Any, tmp_path: Path) -> None:
    with serve(tmp_path / "data") as running:
        done = run(APART, os.environ[REAL_DATA], "--url", running.url, "--out", tmp_path / "found.json")
    assert done.returncode == 0, done.stdout + done.stderr
    for rows in json.loads((tmp_path / "found.json").read_text())["ways"].values():
        assert min(rows[name]["precision"] for name in ("banks", "sets", "list")) >= 0.9
        assert rows["banks"]["value_trusted"]
        assert rows["sets"]["value_trusted"]
        assert rows["cosine"]["precision"] <= rows["chance"]["precision"] + 3 * rows["cosine"]["standard_error"]
