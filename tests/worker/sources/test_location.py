from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from service.contract.artifacts import Store
from service.contract.errors import Invalid, Permanent
from worker.sources.location import locate, safe_name


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("é b.png", "é b.png"),
        ("..", None),
        ("a/../b", None),
        ("/a", None),
        ("C:/a", None),
        ("a\\b", None),
        ("a\0", None),
        ("a\n", None),
        ("", None),
        (".", None),
        ("\udcff", None),
        ("x" * 2000, None),
    ],
)
def test_only_plain_relative_paths_are_safe(text: str, safe: str | None):
    assert safe_name(text) == safe


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a\0b",
        "http://example.com/x.tar",
        "ftp://x/y",
        "zip://a::/etc/passwd",
        "/none/x.tar",
        "none-*.tar",
        "store:x",
    ],
)
def test_what_is_nowhere_or_not_ours_to_fetch_is_permanent(store: Store, uri: str):
    def visit() -> None:
        tree = locate(uri, store)
        for name in tree.names:
            tree.open(name).read()

    with pytest.raises(Permanent):
        visit()


def test_a_store_key_names_an_upload(store: Store):
    key, _, _ = store.write_upload("x.tar", [b"data"])
    tree = locate(f"store:{key}", store)
    (name,) = tree.names
    assert tree.read(name) == b"data"
    with pytest.raises(Permanent, match="is not there"):
        locate("store:uploads/up_missing/data", store).head("data")
    with pytest.raises(Permanent, match="is not there"):
        locate("store:../../etc/passwd", store).head("passwd")


def test_object_stores_hold_files_folders_globs_and_ranges(store: Store, tmp_path: Path):
    fs = fsspec.filesystem("memory")
    root = tmp_path.as_posix().strip("/")
    for number in range(3):
        fs.pipe_file(f"/{root}/shards/part-{number}.tar", b"%d" % number)
    fs.pipe_file(f"/{root}/shards/.hidden/x", b"x")
    base = f"memory://{root}/shards"
    assert list(locate(base, store).names) == ["part-0.tar", "part-1.tar", "part-2.tar"]
    assert list(locate(f"{base}/part-*.tar", store).names) == ["part-0.tar", "part-1.tar", "part-2.tar"]
    assert list(locate(f"{base}/part-{{1..2}}.tar", store).names) == ["part-1.tar", "part-2.tar"]
    one = locate(f"{base}/part-1.tar", store)
    assert one.read("part-1.tar") == b"1"
    assert one.has("part-2.tar"), "a table finds its media beside it"
    for nowhere in (f"memory://{root}/nowhere", f"{base}/other-*.tar"):
        with pytest.raises(Permanent, match="nothing at"):
            locate(nowhere, store)


def test_hidden_files_pipes_and_links_out_of_a_folder_are_not_read(store: Store, tmp_path: Path):
    folder = tmp_path / "data"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("x")
    (folder / "good").write_text("x")
    (tmp_path / "outside").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe")
    tree = locate(str(folder), store)
    assert list(tree.names) == ["good", "link", "pipe"]
    for name in ("link", "pipe"):
        with pytest.raises(Invalid, match=name):
            tree.open(name)
