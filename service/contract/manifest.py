"""What an artifact is: the manifest that names its files with their digests, and how a folder becomes one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal, cast

from pydantic import Field, StringConstraints, ValidationError

from service.contract.errors import Permanent
from service.contract.word import Word

MANIFEST: Final = "manifest.json"
BLOCK_BYTES: Final = 1 << 20
SEGMENT: Final = r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,199}"
PATH: Final = re.compile(rf"^{SEGMENT}(/{SEGMENT}){{0,15}}\Z")
"""A key in a store, or a file in an artifact: relative, no hidden names, nothing that a shell or URL could misread."""

Kind = Literal["dataset", "model", "embeddings", "report", "checkpoint"]
Sha256 = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, StringConstraints(strict=True, pattern=rf"^{SEGMENT}(/{SEGMENT}){{0,15}}$")]


class FileEntry(Word):
    """A file of an artifact."""

    sha256: Sha256
    num_bytes: Annotated[int, Field(ge=0)]


class Manifest(Word):
    """What an artifact is; `digest` covers the files and the body."""

    format: Literal[1] = 1
    kind: Kind
    id: str
    created_at: datetime
    code_version: str
    files: dict[RelativePath, FileEntry]
    body: dict[str, Any]
    digest: Sha256

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.num_bytes for entry in self.files.values())


@cache
def code_version() -> str:
    """Return the version of this package, or `0+unknown` for a bare source tree."""
    try:
        return version("isthmus")
    except PackageNotFoundError:
        return "0+unknown"


def digest_of(files: dict[str, FileEntry], body: dict[str, Any]) -> str:
    """Compute the digest of an artifact: SHA-256 over the sorted paths with their digests, and the canonical body."""
    digest = hashlib.sha256()
    for path, entry in sorted(files.items()):
        digest.update(f"{path}\0{entry.sha256}\n".encode())
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    digest.update(canonical.encode())
    return digest.hexdigest()


def describe(folder: Path, *, kind: Kind, id: str, body: dict[str, Any]) -> Manifest:  # noqa: A002
    """Build the manifest of a folder, reading every file.

    Raises ValueError for links, for names that are not safe, and for a body that JSON cannot hold.
    """
    plain = cast("dict[str, Any]", json.loads(json.dumps(body, allow_nan=False)))
    files: dict[str, FileEntry] = {}
    for path in survey(folder):
        digest, num_bytes = hashlib.sha256(), 0
        with (folder / path).open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
                num_bytes += len(block)
        files[path] = FileEntry(sha256=digest.hexdigest(), num_bytes=num_bytes)
    return Manifest(
        kind=kind,
        id=id,
        created_at=datetime.now(UTC),
        code_version=code_version(),
        files=files,
        body=plain,
        digest=digest_of(files, plain),
    )


def parse_manifest(key: str, text: bytes) -> Manifest:
    """Read a manifest.

    Raises Permanent if it is damaged.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        raise damaged(f"{key}/{MANIFEST} cannot be read") from error
    if manifest.digest != digest_of(dict(manifest.files), manifest.body):
        raise damaged(f"{key}/{MANIFEST} does not match its digest")
    return manifest


def copy(source: BinaryIO, target: BinaryIO | None, name: str, entry: FileEntry) -> None:
    """Read a file to its end, comparing it with its entry, and write it on if there is a target.

    Raises Permanent if it differs.
    """
    digest, num_bytes = hashlib.sha256(), 0
    while block := source.read(BLOCK_BYTES):
        digest.update(block)
        num_bytes += len(block)
        if target is not None:
            target.write(block)
    if num_bytes != entry.num_bytes:
        raise damaged(f"{name} has {num_bytes} bytes, its manifest says {entry.num_bytes}")
    if digest.hexdigest() != entry.sha256:
        raise damaged(f"{name} does not match its digest")


def survey(folder: Path) -> list[str]:
    """List the regular files of a folder, sorted, a manifest left out.

    Raises ValueError for links, devices and names that are not plain.
    """
    if not folder.is_dir() or folder.is_symlink():
        msg = f"{folder} is not a folder"
        raise ValueError(msg)
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = (Path(parent) / name).relative_to(folder).as_posix()
            mode = (Path(parent) / name).lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or not PATH.match(path):
                msg = f"{path!r} cannot be part of an artifact: regular files with plain names only"
                raise ValueError(msg)
            if stat.S_ISREG(mode) and path != MANIFEST:
                found.append(path)
    return sorted(found)


def damaged(message: str) -> Permanent:
    """Make the error for an artifact whose bytes are not what they were."""
    return Permanent(f"damaged artifact: {message}", code="artifact_damaged")
