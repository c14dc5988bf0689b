from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from service.contract.errors import Permanent
from worker.sources.reading import format_of


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"PK\x03\x04...", "zip"),
        (b"PAR1....", "parquet"),
        (b"\x1f\x8b\x08", "tar"),
        (bytes(1024), "other"),
        (b'\xef\xbb\xbf {"a": 1}\n', "table"),
        (b"image,text\na,b\n", "table"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "other"),
        (b"\xff\xd8\xff\xe0", "other"),
        (b"", "other"),
    ],
)
def test_the_content_says_what_a_file_is(head: bytes, found: str):
    assert format_of(head) == found


def test_a_folder_of_members_is_read(tmp_path: Path, read, png: bytes):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png)
        (tmp_path / f"{number}.txt").write_text(f"a caption, with a comma {number}\nand a line\n")
        (tmp_path / f"{number}.json").write_text('{"speaker": "ann"}')
    (tmp_path / "README.txt").write_text("About, these\nimages\n")
    found = read(tmp_path, fields=("speaker",))
    assert [sample.key for sample in found if len(sample.values) == 2] == ["0", "1", "2"]
    assert found[0].fields == {"speaker": "ann"}


def test_a_folder_of_zips_is_read(tmp_path: Path, read):
    for number in range(2):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as archive:
            archive.writestr(f"{number}.txt", "text")
    assert [sample.key for sample in read(tmp_path)] == ["0", "1"]


def test_an_upload_is_read_from_the_store_whatever_its_name(store, read, write_tar, tmp_path: Path):
    data = write_tar(tmp_path / "x.tar", [("1.txt", b"one")]).read_bytes()
    key, _, _ = store.write_upload("photo.jpg", [data])
    assert [sample.key for sample in read(f"store:{key}")] == ["1"]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("2.txt", "two")
    key, _, _ = store.write_upload("x", [stream.getvalue()])
    assert [sample.key for sample in read(f"store:{key}")] == ["2"]


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\x00\x01\x02" * 10, b"%PDF", b"\x7fELF" + bytes(600)])
def test_whatever_else_comes_is_refused(tmp_path: Path, read, content: bytes):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(Permanent, match=r"is no tar, zip, Parquet, CSV or JSONL"):
        read(tmp_path / "x.bin")


def test_an_empty_folder_is_refused(tmp_path: Path, read):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Permanent, match="empty is no tar"):
        read(tmp_path / "empty")
