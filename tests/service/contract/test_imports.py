"""A path is judged by where it leads, links and dots followed, before anybody looks whether it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from service.contract.imports import is_allowed, local_path
from service.contract.jobs import ImportModelArgs
from service.contract.settings import Settings


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("/models/clip", "/models/clip"),
        ("file:///models/clip", "/models/clip"),
        ("local:///models/clip", "/models/clip"),
        ("s3://bucket/clip", None),
        ("openai/clip-vit-base-patch32", None),
    ],
)
def test_a_source_names_a_path_or_something_far_away(source: str, path: str | None) -> None:
    assert local_path(source) == (None if path is None else Path(path))
    assert ImportModelArgs(source=source).source == source


@pytest.mark.parametrize(
    "source",
    [
        "relative",
        "a/b/c",
        "./a",
        "../a/b",
        "file://a/b",
        "",
        "s3://b/x::file:///etc",
        "/a\0b",
        "store:models/a",
        "~/clip",
    ],
)
def test_what_is_no_place_is_refused_with_what_a_place_is(source: str) -> None:
    with pytest.raises(ValidationError, match=r"a checkpoint lies at|at least 1|NUL"):
        TypeAdapter(ImportModelArgs).validate_python({"source": source})


def test_only_what_lies_in_a_folder_for_imports_is_allowed(tmp_path: Path) -> None:
    folder, beside = tmp_path / "imports", tmp_path / "imports-too"
    for made in (folder / "clip", beside):
        made.mkdir(parents=True)
    (folder / "out").symlink_to(beside)
    (folder / "in").symlink_to(folder / "clip")
    (folder / "loop").symlink_to(folder / "loop")
    (tmp_path / "link").symlink_to(folder)
    folders = [folder.resolve()]
    for inside in (folder, folder / "clip", folder / "in", folder / "not-there", tmp_path / "link" / "clip"):
        assert is_allowed(inside, folders), inside
    for outside in (
        beside,
        tmp_path,
        Path("/"),
        folder / ".." / "imports-too",
        folder / "out",
        folder / "out" / "x",
        folder / "loop",
    ):
        assert not is_allowed(outside, folders), outside
    assert not is_allowed(folder, [])


def test_the_folders_are_set_up_or_lie_in_the_data_folder(tmp_path: Path) -> None:
    assert Settings(data=tmp_path).resolved_import_folders() == (tmp_path.resolve() / "imports",)
    given = os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b" / ".." / "c")])
    assert Settings(import_folders=given).resolved_import_folders() == (
        tmp_path.resolve() / "a",
        tmp_path.resolve() / "c",
    )
    assert Settings(import_folders="").resolved_import_folders() == ()
