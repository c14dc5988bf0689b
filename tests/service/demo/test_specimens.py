from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from service.demo import digits
from service.demo.specimens import Collection, Specimen, read_tar, thin, write_tar


@pytest.fixture(scope="module")
def scans() -> Collection:
    return digits.collect(0)


def test_scans_are_small_grey_images_and_every_fifth_of_a_class_is_held_out(scans: Collection) -> None:
    assert len(scans.train) + len(scans.holdout) == 1797
    assert not {each.key for each in scans.train} & {each.key for each in scans.holdout}
    assert {each.label for each in scans.holdout} == set(digits.WORDS)
    with Image.open(io.BytesIO(scans.train[0].payload)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (8, 8))


def test_captions_change_with_the_seed_and_the_split_does_not(scans: Collection) -> None:
    other = digits.collect(1)
    assert [each.key for each in other.holdout] == [each.key for each in scans.holdout]
    assert [each.payload for each in other.train] == [each.payload for each in scans.train]
    assert [each.caption for each in other.train] != [each.caption for each in scans.train]
    assert digits.collect(0) == scans


def test_a_tar_holds_four_members_a_sample_and_names_the_split(scans: Collection, tmp_path: Path) -> None:
    path = tmp_path / "image-text.tar"
    write_tar(path, scans)
    with tarfile.open(path) as tar:
        names = tar.getnames()
        assert len(names) == 4 * 1797 == len(set(names))
        assert names[:4] == [f"train-scan0000.{extension}" for extension in ("png", "txt", "cls", "json")]
        splits = [json.load(tar.extractfile(name))["split"] for name in names if name.endswith(".json")]  # type: ignore[arg-type]
    assert splits.count("holdout") == len(scans.holdout)


def test_a_tar_reads_back_what_was_written(scans: Collection, tmp_path: Path) -> None:
    path = tmp_path / "image-text.tar"
    write_tar(path, scans)
    for back, written in zip(read_tar(path, "image"), (scans.train, scans.holdout), strict=True):
        assert [replace(each, key="") for each in back] == [replace(each, key="") for each in written]


def test_a_tar_of_something_else_is_refused_by_name(scans: Collection, tmp_path: Path) -> None:
    path = tmp_path / "image-text.tar"
    write_tar(path, scans)
    with pytest.raises(ValueError, match=r"image-text\.tar: no sample has a \.wav"):
        read_tar(path, "audio")


def test_thinning_keeps_every_class_alike() -> None:
    specimens = [Specimen(f"{label}{at}", b"", "", label) for label in "ab" for at in range(100)]
    kept = thin(specimens, 20)
    assert [each.label for each in kept] == ["a"] * 10 + ["b"] * 10
    assert [each.key for each in kept[:3]] == ["a0", "a10", "a20"]
    assert len(thin(specimens, 1000)) == 200
