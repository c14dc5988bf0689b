"""Files: artifacts are immutable directories, published whole or not at all, readable without a database.

A store is a local folder or any fsspec URL. An artifact's `manifest.json` is written last and names every file with its
digest: what has no manifest does not exist. Keys are relative POSIX paths such as `models/<id>/<epoch>`; the epoch of
the job's lease is part of the key, so that a stale worker never writes where the winner does.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

from fsspec.core import url_to_fs  # pyright: ignore[reportUnknownVariableType]

from service.contract.manifest import MANIFEST, FileEntry, Kind, Manifest, code_version
from service.contract.store import Store
from service.contract.store_folder import FolderStore
from service.contract.store_objects import FileSystem, ObjectStore

__all__ = [
    "MANIFEST",
    "FileEntry",
    "FolderStore",
    "Kind",
    "Manifest",
    "ObjectStore",
    "Store",
    "code_version",
    "open_store",
]


def open_store(url: str, *, cache_dir: Path | None = None) -> Store:
    """Open the store at a local path or any fsspec URL.

    `cache_dir` holds the verified copies of a remote store's artifacts.
    """
    if "://" not in url:
        return FolderStore(Path(url).absolute())
    if url.startswith(("file://", "local://")):
        return FolderStore(Path(url.partition("://")[2]).absolute())
    # Without a listings cache: another process publishes and deletes behind our back.
    fs, root = cast("tuple[FileSystem, str]", url_to_fs(url, use_listings_cache=False))
    folder = cache_dir or Path.home() / ".cache" / "isthmus"
    return ObjectStore(fs, root, folder / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16])
