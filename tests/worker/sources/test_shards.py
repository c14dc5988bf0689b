from __future__ import annotations

import io
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest

from service.contract.errors import Permanent
from worker.sources.sample import MAX_VALUE_BYTES, Value


def sample(number: int) -> list[tuple[str, bytes]]:
    return [(f"{number:04d}.png", b"\x89PNG"), (f"{number:04d}.txt", b"text"), (f"{number:04d}.cls", b"7\n")]


def test_consecutive_members_of_one_key_are_a_sample(tmp_path: Path, read, write_tar):
    members = [
        ("a/b.c/0001.png", b"i"),
        ("a/b.c/0001.seg.png", b"x"),
        ("a/b.c/0001.TXT", b"t"),
        ("a/b.c/0001.cls", b"3\n"),
    ]
    (found,) = read(write_tar(tmp_path / "x.tar", members))
    assert found.key == "a/b.c/0001"
    assert found.values == {"image": Value("image", b"i"), "text": Value("text", b"t")}
    assert found.label == "3"
    assert found.problem is None


def test_shards_are_read_from_a_folder_a_glob_a_range_and_whatever_their_names(tmp_path: Path, read, write_tar):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        write_tar(folder / f"part-{shard:03d}.bin", sample(2 * shard) + sample(2 * shard + 1))
    keys = [f"{number:04d}" for number in range(6)]
    for source in (folder, f"file://{folder}", folder / "part-*.bin", folder / "part-{000..002}.bin"):
        assert [found.key for found in read(source)] == keys
    assert [found.key for found in read(folder / "part-{001..001}.bin")] == keys[2:4]
    with pytest.raises(Permanent, match=r"part-003\.bin is not there"):
        read(folder / "part-{000..003}.bin")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_shards_are_read(tmp_path: Path, read, write_tar, mode: str):
    assert len(read(write_tar(tmp_path / "x", sample(0) + sample(1), mode))) == 2


def test_tokens_metadata_and_mapped_extensions(tmp_path: Path, read, write_tar):
    members = [
        ("1.imu.npy", b"\x93NUMPY.."),
        ("1.codes.ids.npy", b"\x93NUMPY.."),
        ("1.leaves.json", b"[1, 2]"),
        ("1.json", b'{"speaker": "ann", "split": "test", "label": 4, "other": 1}'),
        ("1.depth.png", b"\x89PNG"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    (found,) = read(path, fields=("speaker", "split"))
    assert {name: value.kind for name, value in found.values.items()} == {
        "imu": "npy",
        "codes": "npy",
        "leaves": "json",
    }
    assert found.fields == {"speaker": "ann", "split": "test"}
    assert found.label == "4"
    (mapped,) = read(path, mapping={"depth": ".depth.png", "pose": "imu.npy"})
    assert {name: value.kind for name, value in mapped.values.items()} == {"depth": "image", "pose": "npy"}


def test_two_members_for_one_modality_are_a_problem_and_a_mapping_settles_it(tmp_path: Path, read, write_tar):
    path = write_tar(tmp_path / "x.tar", [("1.png", b"a"), ("1.jpg", b"b"), ("2.txt", b"a"), ("2.txt", b"b")])
    first, second = read(path)
    assert "two members are image" in first.problem
    assert "two members are txt" in second.problem
    assert read(path, mapping={"image": "jpg"})[0].values["image"].data == b"b"


def test_a_json_member_that_is_no_object_is_a_problem(tmp_path: Path, read, write_tar):
    path = write_tar(tmp_path / "x.tar", [("1.txt", b"a"), ("1.json", b"[1]"), ("2.txt", b"a"), ("2.json", b"{")])
    assert ["json member" in found.problem for found in read(path)] == [True, True]


def test_links_devices_and_paths_that_lead_out_are_problems_and_nothing_is_written(tmp_path: Path, read):
    outside = tmp_path / "outside.txt"
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, target in [
            ("0.txt", tarfile.SYMTYPE, "/etc/passwd"),
            ("1.txt", tarfile.LNKTYPE, "0.txt"),
            ("2.txt", tarfile.CHRTYPE, ""),
            ("3.txt", tarfile.FIFOTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        for name in ("../outside.txt", "/etc/outside.txt", "a/../../outside.txt", "C:\\outside.txt", "C:/outside.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        info = tarfile.TarInfo("good.txt")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"good"))
    *bad, good = read(path)
    assert good.values["text"].data == b"good"
    assert len(bad) == 9
    assert all("link or a device" in found.problem for found in bad[:4])
    assert all("no proper name" in found.problem for found in bad[4:])
    assert not outside.exists()


def test_what_a_mac_adds_and_files_without_a_modality_are_passed_over(tmp_path: Path, read, write_tar):
    members = [("./._0.png", b"x"), ("./.DS_Store", b"x"), ("README.md", b"x"), ("./d/0.txt", b"t"), ("9.cls", b"1")]
    assert [found.key for found in read(write_tar(tmp_path / "x.tar", members))] == ["d/0"]


def test_names_in_another_encoding_are_a_problem(tmp_path: Path, read):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("é.txt")
        archive.addfile(info)
    (found,) = read(path)
    assert "no proper name" in found.problem


def test_a_member_that_is_too_large_is_a_problem_not_a_lot_of_memory(tmp_path: Path, read):
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("1.txt")
    info.size = MAX_VALUE_BYTES + 1
    with path.open("wb") as stream:
        stream.write(info.tobuf())
        stream.truncate(512 + (info.size + 511) // 512 * 512 + 1024)
    (found,) = read(path)
    assert f"has {info.size} bytes" in found.problem


def test_a_shard_that_is_cut_off_or_damaged_says_where(tmp_path: Path, read, write_tar):
    whole = write_tar(tmp_path / "x.tar", [("1.txt", b"a" * 600), ("2.txt", b"b" * 600)]).read_bytes()
    for length in (1536 + 100, 1536 + 512 + 100):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(Permanent, match=r"cut\.tar is damaged after '[12]\.txt'"):
            read(tmp_path / "cut.tar")
    broken = bytearray(whole)
    broken[1536 + 10] ^= 0xFF  # the second header: Python's own reader takes this for the end
    (tmp_path / "broken.tar").write_bytes(broken)
    with pytest.raises(Permanent, match=r"broken\.tar is damaged after '1\.txt'"):
        read(tmp_path / "broken.tar")


def test_a_shard_without_an_end_marker_is_read(tmp_path: Path, read, write_tar):
    whole = write_tar(tmp_path / "x.tar", sample(1)).read_bytes()
    (tmp_path / "y.tar").write_bytes(whole[: 6 * 512])
    assert len(read(tmp_path / "y.tar")) == 1


def test_a_compressed_bomb_is_refused(tmp_path: Path, read, write_tar):
    path = write_tar(tmp_path / "x.tgz", [(f"{number}.bin", bytes(4 << 20)) for number in range(12)], "w:gz")
    assert path.stat().st_size < 100_000
    with pytest.raises(Permanent, match="more than 200 bytes come out of one"):
        read(path)


def test_headers_that_claim_absurd_sizes_are_damage(tmp_path: Path, read):
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 1 << 40
        (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(Permanent, match="claims 1099511627776 bytes"):
            read(tmp_path / "x.tar")


def test_a_sparse_map_without_end_does_not_hang(tmp_path: Path, read):
    info = tarfile.TarInfo("x.txt")
    info.size = 512
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.txt"}
    data = b"1000000000\n" + b"1\n" * 250
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + data.ljust(512, b"\n")[:512])
    with pytest.raises(Permanent):
        read(tmp_path / "x.tar")


def test_noise_behind_a_tar_header_never_escapes_the_error_tree(tmp_path: Path, read, write_tar):
    randomly = random.Random(3)
    whole = bytearray(write_tar(tmp_path / "x.tar", sample(0) + sample(1) + sample(2)).read_bytes())
    for _ in range(150):
        noisy = bytearray(whole)
        for _ in range(randomly.randint(1, 8)):
            noisy[randomly.randrange(len(noisy))] = randomly.randrange(256)
        (tmp_path / "noisy.tar").write_bytes(noisy)
        with suppress(Permanent):
            read(tmp_path / "noisy.tar")


def test_a_gzip_header_that_is_cut_off_is_damage(tmp_path: Path, read):
    (tmp_path / "x.tgz").write_bytes(b"\x1f\x8b\x08\x04" + bytes(6))
    with pytest.raises(Permanent, match=r"x\.tgz is damaged"):
        read(tmp_path / "x.tgz")
