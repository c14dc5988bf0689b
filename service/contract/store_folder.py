"""A store in a local folder."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, final

from typing_extensions import override

from service.contract.errors import NotFound
from service.contract.manifest import MANIFEST, Kind, Manifest, describe, survey
from service.contract.store import Store, checked, checked_upload, is_upload, upload_key

TEMPORARY: Final = ".tmp"


@final
class FolderStore(Store):
    """A store in a local folder: write aside, fsync, rename, fsync the parent."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    @override
    def publish(self, folder: Path, key: str, *, kind: Kind, id: str, body: dict[str, Any]) -> Manifest:
        survey(folder)
        staging = self.aside()
        try:
            try:
                folder.rename(staging)
                os.utime(staging)  # young again, whatever a sweep thinks of the files
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                for path in survey(folder):  # not copytree, whose errors have no number
                    (staging / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(folder / path, staging / path)
                shutil.rmtree(folder)
            return self.place(staging, key, describe(staging, kind=kind, id=id, body=body))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def place(self, staging: Path, key: str, manifest: Manifest) -> Manifest:
        """Write the manifest into a folder made by `aside`, force all of it to disk, and rename it into place.

        Raises Conflict if another artifact is there.
        """
        target = self.root / checked(key)
        with (staging / MANIFEST).open("wb") as stream:
            stream.write(manifest.model_dump_json(indent=1).encode())
        _sync_tree(staging)
        _make_folders(target.parent, self.root)
        if not self._move(staging, target):
            return self._settle(key, manifest.digest)
        self._remember(key, manifest)
        return manifest

    def aside(self) -> Path:
        """Name a new place on the same file system that nobody reads; sweeps remove what stays there."""
        folder = self.root / TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        return folder / secrets.token_hex(16)

    def _move(self, staging: Path, target: Path) -> bool:
        """Rename into place; false if a complete artifact is there already."""
        while True:
            try:
                staging.rename(target)
            except OSError as error:
                if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    raise
                if (target / MANIFEST).is_file():
                    return False
                # Nothing of ours leaves a folder without a manifest here; whatever did, it is no artifact.
                with suppress(FileNotFoundError):
                    target.rename(self.aside())
            else:
                _sync(target.parent)
                return True

    @override
    def open(self, key: str, path: str) -> BinaryIO:
        try:
            return (self.root / self._named(key, path)).open("rb")
        except FileNotFoundError:
            raise NotFound(f"{key} is gone") from None

    @override
    def local(self, key: str) -> Path:
        self.manifest(key)
        path = self.root / key
        if not path.is_dir():
            self._forget(key)
            raise NotFound(f"{key} is gone")
        return path

    @override
    def open_upload(self, key: str) -> BinaryIO:
        try:
            return (self.root / checked_upload(key)).open("rb")
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound("there is no such upload") from None

    @override
    def write_upload(self, name: str, chunks: Iterable[bytes]) -> tuple[str, int, str]:
        key = upload_key(name)
        partial = self.aside()
        target = self.root / key
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with partial.open("xb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    digest.update(chunk)
                    num_bytes += len(chunk)
                stream.flush()
                os.fsync(stream.fileno())
            _make_folders(target.parent, self.root)
            partial.rename(target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)
        return key, num_bytes, digest.hexdigest()

    @override
    def list(self, prefix: str) -> list[str]:
        start = self.root / checked(prefix.strip("/")) if prefix.strip("/") else self.root
        found: list[str] = []
        for folder, folders, files in os.walk(start):
            key = Path(folder).relative_to(self.root).as_posix()
            if is_upload(f"{key}/"):
                found += [f"{key}/{file}" for file in files]
            elif MANIFEST in files:
                found.append(key)
                folders.clear()
            folders[:] = [name for name in folders if not name.startswith(".")]
        return sorted(found)

    @override
    def delete(self, key: str) -> None:
        self._forget(key)
        if not self.exists(key):
            return
        gone = self.aside()
        path = self.root / key
        # A rename first: nobody ever sees an artifact of which half is removed.
        try:
            path.rename(gone)
        except FileNotFoundError:
            return
        if gone.is_dir():
            shutil.rmtree(gone)
            return
        gone.unlink()
        if path.parent != self.root:
            path.parent.rmdir()

    @override
    def exists(self, key: str) -> bool:
        path = self.root / checked(key)
        return path.is_file() if is_upload(key) else (path / MANIFEST).is_file()

    @override
    def modified_at(self, key: str) -> float:
        path = self.root / checked(key)
        try:
            return (path if is_upload(key) else path / MANIFEST).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"there is no {key}") from None

    @override
    def sweep_temporary(self, older_than_s: float) -> int:
        return _sweep(self.root / TEMPORARY, older_than_s)

    @override
    def _manifest_bytes(self, key: str) -> bytes:
        try:
            return (self.root / key / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"there is no artifact {key}") from None


def _sync_tree(folder: Path) -> None:
    """Force the files of a folder and the folders themselves to disk, innermost first."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent) / name)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folders(folder: Path, root: Path) -> None:
    """Create a folder under the root so that it survives a power cut: every new entry's parent is synced."""
    missing: list[Path] = []
    while not folder.is_dir() and folder != root:
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(parents=True, exist_ok=True)
        _sync(path.parent)


def _sweep(folder: Path, older_than_s: float) -> int:
    """Remove the entries of a folder that nobody has touched for a while."""
    removed, now = 0, time.time()
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            newest = max(item.lstat().st_mtime for item in (path, *path.rglob("*")))
            if now - newest < older_than_s:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            continue
        removed += 1
    return removed
