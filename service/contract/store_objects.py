"""A store behind an fsspec file system, such as S3."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Protocol, cast, final

from typing_extensions import override

from service.contract.errors import NotFound, Permanent
from service.contract.manifest import MANIFEST, Kind, Manifest, copy, describe
from service.contract.store import Store, checked, checked_upload, is_upload, upload_key
from service.contract.store_folder import FolderStore


class FileSystem(Protocol):
    """What we use of an fsspec file system, which itself is untyped."""

    def put_file(self, lpath: str, rpath: str) -> None:
        """Copy a local file into the store."""
        ...

    def cat_file(self, path: str) -> bytes:
        """Read an object."""
        ...

    def pipe_file(self, path: str, value: bytes, mode: Literal["create", "overwrite"]) -> None:
        """Write an object."""
        ...

    def open(self, path: str, mode: str) -> IO[bytes]:
        """Open an object."""
        ...

    def exists(self, path: str) -> bool:
        """Tell whether there is such an object."""
        ...

    def find(self, path: str) -> list[str]:
        """List all objects under a prefix."""
        ...

    def modified(self, path: str) -> datetime:
        """Tell when an object was written."""
        ...

    def rm_file(self, path: str) -> None:
        """Remove an object."""
        ...


@final
class ObjectStore(Store):
    """A store behind an fsspec file system: put the files, then the manifest; read through a verified local cache."""

    def __init__(self, fs: FileSystem, root: str, cache_dir: Path) -> None:
        super().__init__()
        self.fs = fs
        self.root = root.rstrip("/")
        self.cache = FolderStore(cache_dir)

    @override
    def publish(self, folder: Path, key: str, *, kind: Kind, id: str, body: dict[str, Any]) -> Manifest:
        target = self._at(checked(key))
        manifest = describe(folder, kind=kind, id=id, body=body)
        if self.fs.exists(f"{target}/{MANIFEST}"):
            existing = self._settle(key, manifest.digest)
            shutil.rmtree(folder)
            return existing
        for path in sorted(manifest.files):
            self.fs.put_file(str(folder / path), f"{target}/{path}")
        try:
            # Created, not overwritten, where the store knows how: of two writers, the first one wins.
            self.fs.pipe_file(f"{target}/{MANIFEST}", manifest.model_dump_json(indent=1).encode(), mode="create")
        except FileExistsError:
            manifest = self._settle(key, manifest.digest)
        self._remember(key, manifest)
        shutil.rmtree(folder)
        return manifest

    @override
    def open(self, key: str, path: str) -> BinaryIO:
        try:
            return cast("BinaryIO", self.fs.open(self._at(self._named(key, path)), "rb"))
        except FileNotFoundError:
            raise NotFound(f"{key} is gone") from None

    @override
    def local(self, key: str) -> Path:
        try:
            return self.cache.local(key)
        except NotFound:
            manifest = self.manifest(key)
        staging = self.cache.aside()
        staging.mkdir()
        try:
            for path, entry in manifest.files.items():
                (staging / path).parent.mkdir(parents=True, exist_ok=True)
                with self.open(key, path) as source, (staging / path).open("xb") as target:
                    copy(source, target, f"{key}/{path}", entry)
            self.cache.place(staging, key, manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return self.cache.local(key)

    @override
    def verified(self, key: str) -> Path:
        # What counts is the copy that will be read. It was compared as it was made; an old one may have rotted since.
        folder = self.local(key)
        try:
            self.cache.verify(key)
        except Permanent:
            self.cache.delete(key)
            folder = self.local(key)
        return folder

    @override
    def open_upload(self, key: str) -> BinaryIO:
        try:
            return cast("BinaryIO", self.fs.open(self._at(checked_upload(key)), "rb"))
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound("there is no such upload") from None

    @override
    def write_upload(self, name: str, chunks: Iterable[bytes]) -> tuple[str, int, str]:
        key = upload_key(name)
        digest, num_bytes = hashlib.sha256(), 0
        complete = False
        try:
            with self.fs.open(self._at(key), "wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    digest.update(chunk)
                    num_bytes += len(chunk)
            complete = True
        finally:
            # Closing an fsspec file commits it even while an exception passes; nobody was told this key yet.
            if not complete:
                self._remove([self._at(key)])
        return key, num_bytes, digest.hexdigest()

    @override
    def list(self, prefix: str) -> list[str]:
        clean = prefix.strip("/")
        paths = self._find(checked(clean) if clean else "")
        found = {path.rpartition("/")[0] for path in paths if path.endswith(f"/{MANIFEST}")}
        return sorted(found | {path for path in paths if is_upload(path)})

    @override
    def delete(self, key: str) -> None:
        self._forget(key)
        self.cache.delete(key)
        if not self.exists(key):
            return
        if is_upload(key):
            self._remove([self._at(key)])
            return
        files = [path for path in self._find(key) if path != f"{key}/{MANIFEST}"]
        # The manifest goes first: from then on there is no artifact, only leftovers that a sweep removes.
        self._remove([self._at(f"{key}/{MANIFEST}"), *(self._at(path) for path in files)])

    @override
    def exists(self, key: str) -> bool:
        return self.fs.exists(self._at(checked(key) if is_upload(key) else f"{checked(key)}/{MANIFEST}"))

    @override
    def modified_at(self, key: str) -> float:
        try:
            path = self._at(checked(key) if is_upload(key) else f"{checked(key)}/{MANIFEST}")
            return self.fs.modified(path).timestamp()
        except FileNotFoundError:
            raise NotFound(f"there is no {key}") from None

    @override
    def sweep_temporary(self, older_than_s: float) -> int:
        paths = self._find("")
        complete = {path.rpartition("/")[0] for path in paths if path.endswith(f"/{MANIFEST}")}
        now, removed = time.time(), 0
        for path in paths:
            if is_upload(path) or any(folder in complete for folder in _ancestors(path)):
                continue
            if now - self.fs.modified(self._at(path)).timestamp() >= older_than_s:
                self._remove([self._at(path)])
                removed += 1
        return removed + self.cache.sweep_temporary(older_than_s)

    @override
    def _manifest_bytes(self, key: str) -> bytes:
        try:
            return self.fs.cat_file(self._at(f"{key}/{MANIFEST}"))
        except FileNotFoundError:
            raise NotFound(f"there is no artifact {key}") from None

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _find(self, prefix: str) -> list[str]:
        try:
            found = self.fs.find(self._at(prefix).rstrip("/"))
        except FileNotFoundError:
            return []
        return [path[len(self.root) :].lstrip("/") for path in found]

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            try:
                self.fs.rm_file(path)
            except FileNotFoundError:
                continue


def _ancestors(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
