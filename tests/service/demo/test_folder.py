from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from service.demo import speech
from service.demo.client import DemoError
from service.demo.folder import read_folder
from service.demo.tour import make_data


def write(path: Path, extension: str, label: str) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in ((f"k.{extension}", b"payload"), ("k.txt", b"a caption"), ("k.cls", label.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def fill(folder: Path, image_label: str = "7", audio_label: str = "7") -> None:
    for split in ("train", "test"):
        write(folder / f"image-text-{split}.tar", "png", image_label)
        write(folder / f"audio-text-{split}.tar", "wav", audio_label)


def test_the_test_tars_are_held_out(tmp_path: Path) -> None:
    fill(tmp_path)
    images, sounds = read_folder(tmp_path)
    assert (len(images.train), len(images.holdout), images.medium) == (1, 1, "image")
    assert (sounds.train[0].payload, sounds.train[0].caption, sounds.train[0].label) == (b"payload", "a caption", "7")


def test_missing_tars_are_named(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "audio-text-test.tar").unlink()
    with pytest.raises(DemoError, match=r"needs audio-text\.tar, or audio-text-train\.tar and"):
        read_folder(tmp_path)


def test_a_file_that_is_no_tar_is_an_error_of_the_demo(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "image-text-train.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DemoError):
        read_folder(tmp_path)


def test_media_without_a_common_class_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, audio_label="bark")
    with pytest.raises(DemoError, match="no class in common"):
        read_folder(tmp_path)


def test_the_demos_own_data_read_back_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "_TAKES", 1)  # of twelve: speaking is what takes the time
    assert make_data(tmp_path, seed=0) == 0
    images, sounds = read_folder(tmp_path)
    assert (len(images.train), len(images.holdout)) == (1442, 355)
    assert {each.label for each in sounds.holdout} == {each.label for each in images.holdout}
    assert (len(sounds.train), len(sounds.holdout)) == (10 * len(speech.VOICES), 400)
    assert sounds.holdout[0].origin in speech.UNHEARD


def test_a_tar_without_held_out_samples_is_refused(tmp_path: Path) -> None:
    for medium, extension in (("image", "png"), ("audio", "wav")):
        write(tmp_path / f"{medium}-text.tar", extension, "7")
    with pytest.raises(DemoError, match="split"):
        read_folder(tmp_path)
