from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from service.contract.artifacts import Store, open_store
from worker.sources.reading import read_source
from worker.sources.sample import Raw, Wanted

Read = Callable[..., list[Raw]]
WriteTar = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def read(store: Store) -> Read:
    def read(source: object, *, mapping: dict[str, str] | None = None, fields: tuple[str, ...] = ()) -> list[Raw]:
        return list(read_source(str(source), store, Wanted(mapping, frozenset(fields))))

    return read


@pytest.fixture
def png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 6), 128).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def write_tar() -> WriteTar:
    def write(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
        with tarfile.open(path, mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write
