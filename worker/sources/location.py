"""Where a source lies: a tree of named files, local, uploaded, or in an object store."""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol, cast, final

from fsspec.core import url_to_fs
from typing_extensions import override

from service.contract.errors import Invalid, Permanent
from worker.sources.sample import MAX_VALUE_BYTES
from worker.sources.streams import steady, translated

if TYPE_CHECKING:
    from service.contract.artifacts import Store

UPLOAD: Final = "store:"
SCHEMES: Final = frozenset({"s3", "gs", "az", "memory"})
MAX_BRACES: Final = 100_000
MAX_FILES: Final = 5_000_000
UNSAFE: Final = re.compile(r"[\x00-\x1f\\]")


class Tree(ABC):
    """Files by their relative POSIX names."""

    def __init__(self, title: str) -> None:
        self.title = title

    @cached_property
    def names(self) -> dict[str, None]:
        """Name every visible file, sorted; a dict, so that asking for one is cheap."""
        found: list[str] = []
        for name in self._walk():
            if len(found) == MAX_FILES:
                raise Permanent(f"{self.title} has more than {MAX_FILES} files: pack them in tar shards")
            found.append(name)
        return dict.fromkeys(sorted(found))

    @abstractmethod
    def _walk(self) -> Iterator[str]:
        """Name every visible file, in any order."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file that the tree has.

        Raises Permanent or Transient if it cannot be read, Invalid if it must not be.
        """

    def has(self, name: str) -> bool:
        """Tell whether there is such a file, also beside a single file that was asked for."""
        return name in self.names

    def read(self, name: str) -> bytes:
        """Read a whole file.

        Raises Invalid if there is none of that name, or if it is too large for a value.
        """
        if not self.has(name):
            raise Invalid(f"there is no file {name!r}")
        with self.open(name) as stream:
            data = stream.read(MAX_VALUE_BYTES + 1)
        if len(data) > MAX_VALUE_BYTES:
            raise Invalid(f"{name} has more than {MAX_VALUE_BYTES} bytes")
        return data

    def head(self, name: str) -> bytes:
        """Read a file's first bytes, enough for any signature."""
        with self.open(name) as stream:
            return stream.read(4096)


@final
class SingleFile(Tree):
    """One file with nothing around it, such as an upload."""

    def __init__(self, title: str, opener: Callable[[], BinaryIO]) -> None:
        super().__init__(title)
        self._opener = opener

    @override
    def _walk(self) -> Iterator[str]:
        yield self.title

    @override
    def open(self, name: str) -> BinaryIO:
        with translated(name):
            return steady(self._opener(), name)


@final
class LocalTree(Tree):
    """A local folder, or some files of it; links may not lead out of it."""

    def __init__(self, root: Path, only: list[str] | None = None) -> None:
        super().__init__(root.name or str(root))
        self.root = root.resolve()
        self.only = only

    @override
    def _walk(self) -> Iterator[str]:
        if self.only is not None:
            yield from self.only
            return
        for parent, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if visible(name)]
            relative = Path(parent).relative_to(self.root)
            yield from ((relative / name).as_posix() for name in files if visible(name))

    @override
    def has(self, name: str) -> bool:
        with translated(name):
            return (self.root / name).is_file()

    @override
    def open(self, name: str) -> BinaryIO:
        with translated(name):
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise Invalid(f"{name} is a link that leads out of the folder")
            if not stat.S_ISREG(path.stat().st_mode):
                raise Invalid(f"{name} is not a regular file")
            return steady(path.open("rb", buffering=0), name)


class RemoteFiles(Protocol):
    """What we use of an fsspec file system."""

    def open(self, path: str, mode: str) -> BinaryIO:
        """Open an object."""
        ...

    def find(self, path: str) -> list[str]:
        """List all objects under a prefix."""
        ...

    def glob(self, path: str) -> list[str]:
        """List the objects that match."""
        ...

    def isfile(self, path: str) -> bool:
        """Tell whether there is an object of exactly this name."""
        ...


@final
class RemoteTree(Tree):
    """A prefix in an object store, or some files of it."""

    def __init__(self, fs: RemoteFiles, root: str, only: list[str] | None = None) -> None:
        super().__init__(root.rstrip("/").rpartition("/")[2] or root)
        self.fs = fs
        self.root = root.rstrip("/")
        self.only = only

    @override
    def _walk(self) -> Iterator[str]:
        if self.only is not None:
            yield from self.only
            return
        with translated(self.title):
            for path in self.fs.find(self.root):
                name = path[len(self.root) :].lstrip("/")
                if name and all(map(visible, name.split("/"))):
                    yield name

    @override
    def has(self, name: str) -> bool:
        if self.only is None:
            return name in self.names
        with translated(name):
            return self.fs.isfile(f"{self.root}/{name}")

    @override
    def open(self, name: str) -> BinaryIO:
        with translated(name):
            return steady(self.fs.open(f"{self.root}/{name}", "rb"), name)


def locate(uri: str, store: Store) -> Tree:
    """Find what a URI names: an upload (`store:<key>`), a path, file://, or an object store.

    A file name may hold `*` or a range such as `{0000..0099}`. Raises Permanent if there is no such thing, Transient if
    the other side cannot be reached.
    """
    if "\0" in uri or not uri:
        raise Permanent("the source is not a URI")
    scheme, separator, rest = uri.partition("://")
    if uri.startswith(UPLOAD):
        key = uri.removeprefix(UPLOAD)
        return SingleFile(PurePosixPath(key).name, lambda: store.open_upload(key))
    if not separator or scheme in {"file", "local"}:
        return _locate_local(rest if separator else uri)
    if scheme not in SCHEMES:
        raise Permanent(f"sources are paths, file:// and {', '.join(sorted(SCHEMES))}, not {scheme[:20]}://")
    return _locate_remote(uri)


def _locate_local(text: str) -> Tree:
    path = Path(text).absolute()
    with translated(text):
        if path.is_dir():
            return LocalTree(path)
        if path.exists():
            return LocalTree(path.resolve().parent, [path.resolve().name])
        if names := _braces(path.name):
            return LocalTree(path.parent, names)
        if has_magic(path.name):
            names = sorted(match.name for match in path.parent.glob(path.name) if match.is_file())
            if names:
                return LocalTree(path.parent, names)
    raise Permanent(f"there is no file or folder {text}")


def _locate_remote(uri: str) -> Tree:
    with translated(uri):
        try:
            fs, path = cast("tuple[RemoteFiles, str]", url_to_fs(uri, use_listings_cache=False))
        except ImportError as error:
            raise Permanent(f"this worker cannot read {uri.partition('://')[0]}://: {error}") from error
        root, _, name = path.rstrip("/").rpartition("/")
        if names := _braces(name):
            return RemoteTree(fs, root, names)
        if fs.isfile(path):
            return RemoteTree(fs, root, [name])
        if has_magic(name):
            names = sorted(match.rpartition("/")[2] for match in fs.glob(path))
            if names:
                return RemoteTree(fs, root, names)
        tree = RemoteTree(fs, path)
    if not tree.names:
        raise Permanent(f"there is nothing at {uri}")
    return tree


def _braces(name: str) -> list[str]:
    """Expand a range in braces, as WebDataset writes shards; empty if there is none."""
    match = re.fullmatch(r"([^{}]*)\{(\d{1,9})\.\.(\d{1,9})\}([^{}]*)", name)
    if match is None:
        return []
    head, first, last, tail = match.groups()
    if not 0 <= int(last) - int(first) < MAX_BRACES:
        raise Permanent(f"{name} names no shards, or more than {MAX_BRACES}")
    return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]


def visible(name: str) -> bool:
    """Tell whether a file is data: not hidden, and not what an archiver on a Mac adds."""
    return not name.startswith(".") and name != "__MACOSX"


def safe_name(text: str) -> str | None:
    """Return a relative path in normal form; None if it could lead anywhere else."""
    if not text or len(text) > 1024 or text.startswith("/") or UNSAFE.search(text):
        return None
    parts = [part for part in text.split("/") if part not in {"", "."}]
    if not parts or ".." in parts or (len(parts[0]) > 1 and parts[0][1] == ":"):
        return None
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return "/".join(parts)
