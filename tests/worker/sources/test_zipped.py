from __future__ import annotations

import random
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

from service.contract.errors import Permanent


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def raw_zip(path: Path, names: list[bytes], *, data: bytes = b"text", shared: bool = False) -> Path:
    """Write a zip by hand, with names that Python's writer would mend, and all entries on the same bytes if shared."""
    body, directory = b"", b""
    for name in names:
        crc, size = zlib.crc32(data), len(data)
        offset = 0 if shared else len(body)
        if not (shared and body):
            body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, size, size, len(name), 0) + name + data
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, offset
        )
        directory += name
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(names), len(names), len(directory), len(body), 0)
    path.write_bytes(body + directory + end)
    return path


def test_a_zip_of_members_is_read_in_order(tmp_path: Path, read, png: bytes):
    path = write_zip(
        tmp_path / "x.bin", {"d/2.png": png, "d/2.txt": b"two", "d/1.png": png, "d/1.txt": b"one", "d/": b""}
    )
    assert [(found.key, found.values["text"].data) for found in read(path)] == [("d/1", b"one"), ("d/2", b"two")]


def test_a_zip_with_a_manifest_and_media_is_read(tmp_path: Path, read, png: bytes):
    table = b"image,text\nimages/a.png,one\nimages/missing.png,two\n../outside.png,three\n"
    first, second, third = read(write_zip(tmp_path / "x.zip", {"data/manifest.csv": table, "data/images/a.png": png}))
    assert first.values["image"].data == png
    assert "line 3: image 'images/missing.png' is not in the data set" in second.problem
    assert "line 4: image '../outside.png' leads out of the data set" in third.problem


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"../evil.txt", "leads out"),
        (b"a/../../evil.txt", "leads out"),
        (b"/etc/evil.txt", "leads out"),
        (b"C:/evil.txt", "leads out"),
        (b"C:\\evil.txt", "leads out"),
        (b"a\\b.txt", "leads out"),
        (b"a\0.txt", "leads out"),
        (b"good.txt", "same name"),
        (b"GOOD.TXT", "same name"),
        (b"./good.txt", "same name"),
    ],
)
def test_one_hostile_name_refuses_the_whole_archive(tmp_path: Path, read, name: bytes, reason: str):
    with pytest.raises(Permanent, match=reason):
        read(raw_zip(tmp_path / "x.zip", [b"good.txt", name]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.zip"]


def test_an_empty_archive_is_refused_for_good(tmp_path: Path, read):
    with pytest.raises(Permanent, match="holds no files"):
        read(write_zip(tmp_path / "x.zip", {}))


def test_links_are_refused(tmp_path: Path, read):
    info = zipfile.ZipInfo("1.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(Permanent, match="link or a device"):
        read(tmp_path / "x.zip")


def test_a_bomb_is_stopped_by_counting_what_comes_out(tmp_path: Path, read):
    path = write_zip(tmp_path / "x.zip", {f"{number}.txt": bytes(5_000_000) for number in range(10)})
    assert path.stat().st_size < 60_000
    with pytest.raises(Permanent, match="more than 200 to 1"):
        read(path)


def test_a_table_that_inflates_without_end_is_stopped_while_it_is_read(tmp_path: Path, read):
    path = write_zip(tmp_path / "x.zip", {"x.csv": b"text,label\n" + (b"a" * 100_000 + b",1\n") * 500})
    with pytest.raises(Permanent, match="more than 200 to 1"):
        read(path)


def test_a_damaged_table_in_a_zip_is_permanent(tmp_path: Path, read):
    path = raw_zip(tmp_path / "x.zip", [b"x.csv"], data=b"text,label\n" + b"a,1\n" * 2000)
    data = bytearray(path.read_bytes())
    data[data.index(b"a,1")] ^= 1
    path.write_bytes(data)
    with pytest.raises(Permanent, match=r"x\.csv is damaged"):
        read(path)


def test_entries_that_share_bytes_are_refused(tmp_path: Path, read):
    path = raw_zip(tmp_path / "x.zip", [b"1.txt", b"2.txt"], shared=True)
    with pytest.raises(Permanent, match=r"entries '1\.txt' and '2\.txt' overlap"):
        read(path)


def test_a_million_entries_are_refused_before_they_are_loaded(tmp_path: Path, read):
    path = tmp_path / "x.zip"
    directory_bytes = 80 << 20
    with path.open("wb") as stream:
        stream.write(b"PK\3\4")
        stream.truncate(directory_bytes + 100)
        stream.seek(directory_bytes + 100)
        stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, directory_bytes, 100, 0))
    with pytest.raises(Permanent, match="pack so many files in tar shards"):
        read(path)


def test_a_zip_in_a_zip_an_encrypted_one_and_odd_compression_are_refused(tmp_path: Path, read):
    inner = write_zip(tmp_path / "inner.zip", {"1.txt": b"x"}).read_bytes()
    with pytest.raises(Permanent, match="archive within a zip"):
        read(write_zip(tmp_path / "x.zip", {"inner.zip": inner}))
    flagged = bytearray(inner)
    flagged[flagged.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(flagged)
    with pytest.raises(Permanent, match="encrypted"):
        read(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("1.txt", "x")
    with pytest.raises(Permanent, match="neither stored nor deflated"):
        read(tmp_path / "x.zip")


def test_a_member_that_does_not_match_its_checksum_is_a_bad_sample(tmp_path: Path, read):
    path = raw_zip(tmp_path / "x.zip", [b"1.txt", b"2.txt"])
    data = bytearray(path.read_bytes())
    data[data.index(b"text")] ^= 1
    path.write_bytes(data)
    first, second = read(path)
    assert "damaged" in first.problem
    assert second.values["text"].data == b"text"


def test_an_archive_that_is_cut_off_says_so(tmp_path: Path, read):
    data = write_zip(tmp_path / "x.zip", {"1.txt": b"x" * 1000}).read_bytes()
    (tmp_path / "y.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(Permanent, match=r"y\.zip is cut off"):
        read(tmp_path / "y.zip")


def test_noise_never_escapes_the_error_tree(tmp_path: Path, read):
    randomly = random.Random(5)
    whole = write_zip(tmp_path / "x.zip", {f"{number}.txt": b"text" * number for number in range(1, 6)}).read_bytes()
    for _ in range(200):
        noisy = bytearray(whole)
        for _ in range(randomly.randint(1, 6)):
            noisy[randomly.randrange(4, len(noisy))] = randomly.randrange(256)
        (tmp_path / "noisy.zip").write_bytes(noisy)
        with suppress(Permanent):
            read(tmp_path / "noisy.zip")
