"""What every store promises, and the part that does not depend on where the files lie."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Final

from service.contract.errors import Conflict, NotFound
from service.contract.manifest import MANIFEST, PATH, Kind, Manifest, copy, damaged, parse_manifest
from service.contract.word import new_id

UPLOADS: Final = "uploads"
CACHED_MANIFESTS: Final = 4096


class Store(ABC):
    """Artifacts and uploads under one root."""

    def __init__(self) -> None:
        self._manifests: dict[str, Manifest] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def publish(self, folder: Path, key: str, *, kind: Kind, id: str, body: dict[str, Any]) -> Manifest:  # noqa: A002
        """Publish a folder's files under a key, whole or not at all.

        The store takes the folder: it is gone afterwards. An artifact that is already there is returned if it has the
        same digest. Raises Conflict if it has another one, ValueError for links and unsafe file names.
        """

    @abstractmethod
    def open(self, key: str, path: str) -> BinaryIO:
        """Open a file of an artifact for reading.

        Raises NotFound for whatever the manifest does not name.
        """

    @abstractmethod
    def local(self, key: str) -> Path:
        """Return a local directory that holds the artifact's files; treat it as read-only.

        Raises NotFound if there is no such artifact.
        """

    @abstractmethod
    def open_upload(self, key: str) -> BinaryIO:
        """Open an upload for reading; the stream can seek.

        Raises NotFound if there is no such upload.
        """

    @abstractmethod
    def write_upload(self, name: str, chunks: Iterable[bytes]) -> tuple[str, int, str]:
        """Write an upload under a name of our own; return its key, its bytes and its SHA-256.

        Only the suffix of `name` is kept. Whatever `chunks` raises passes through, and nothing stays behind.
        """

    @abstractmethod
    def list(self, prefix: str) -> list[str]:
        """List the keys of artifacts and uploads under a prefix of whole path segments, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an artifact or an upload; what is not there is no error."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Tell whether a complete artifact, or an upload, has this key."""

    @abstractmethod
    def modified_at(self, key: str) -> float:
        """Return when an artifact or an upload was written, in seconds since the epoch.

        Raises NotFound if there is none.
        """

    @abstractmethod
    def sweep_temporary(self, older_than_s: float) -> int:
        """Remove what interrupted writers left behind; return how many entries."""

    @abstractmethod
    def _manifest_bytes(self, key: str) -> bytes:
        """Read a manifest; NotFound if there is none."""

    def manifest(self, key: str) -> Manifest:
        """Read an artifact's manifest, once per store object: artifacts never change.

        Raises NotFound if there is none, Permanent if it is damaged.
        """
        if known := self._manifests.get(key):
            return known
        manifest = parse_manifest(key, self._manifest_bytes(checked(key)))
        self._remember(key, manifest)
        return manifest

    def read(self, key: str, path: str) -> bytes:
        """Read a file of an artifact.

        Raises NotFound for whatever the manifest does not name.
        """
        with self.open(key, path) as stream:
            return stream.read()

    def verify(self, key: str) -> None:
        """Compare every file with its digest.

        Raises Permanent that names the first file that differs, NotFound if there is no such artifact.
        """
        manifest = parse_manifest(key, self._manifest_bytes(checked(key)))
        for path, entry in sorted(manifest.files.items()):
            try:
                with self.open(key, path) as stream:
                    copy(stream, None, f"{key}/{path}", entry)
            except (NotFound, FileNotFoundError):
                raise damaged(f"{key}/{path} is missing") from None

    def verified(self, key: str) -> Path:
        """Return the local directory of an artifact, every file in it compared with its digest.

        Raises Permanent that names the first file that differs, NotFound if there is no such artifact.
        """
        self.verify(key)
        return self.local(key)

    def _remember(self, key: str, manifest: Manifest) -> None:
        with self._lock:
            while len(self._manifests) >= CACHED_MANIFESTS:
                del self._manifests[next(iter(self._manifests))]
            self._manifests[key] = manifest

    def _forget(self, key: str) -> None:
        with self._lock:
            self._manifests.pop(key, None)

    def _named(self, key: str, path: str) -> str:
        """Return the relative path of a file that the manifest names."""
        if path != MANIFEST and path not in self.manifest(key).files:
            raise NotFound(f"{key} has no file of that name")
        return f"{checked(key)}/{path}"

    def _settle(self, key: str, digest: str) -> Manifest:
        """Return the artifact that was there first, if it is the same."""
        self._forget(key)
        existing = self.manifest(key)
        if existing.digest != digest:
            raise Conflict(f"{key} exists with other content", code="artifact_exists")
        return existing


def upload_key(name: str) -> str:
    """Make the key of a new upload; of the caller's file name only a plain suffix is kept."""
    suffix = re.search(r"\.[A-Za-z0-9]{1,8}\Z", name)
    return f"{UPLOADS}/{new_id('up')}/data{suffix.group().lower() if suffix else ''}"


def checked(key: str) -> str:
    """Return a key that is safe to join to a root.

    Raises NotFound for any other.
    """
    if not PATH.match(key):
        raise NotFound("there is nothing by that key")
    return key


def checked_upload(key: str) -> str:
    """Return the key of an upload.

    Raises NotFound for any other.
    """
    if not is_upload(key):
        raise NotFound("there is no such upload")
    return checked(key)


def is_upload(key: str) -> bool:
    """Tell whether a key is an upload's: one file, without a manifest."""
    return key.startswith(f"{UPLOADS}/")
