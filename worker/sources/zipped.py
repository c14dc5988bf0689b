"""A zip as a tree of files: every entry is judged before the first is read, and nothing is ever written.

One hostile entry refuses the whole archive: a zip with `..` in it was made to do harm, and a sample left out would hide
that. What comes out is counted while it is inflated, whatever the headers claim.
"""

from __future__ import annotations

import io
import stat
import struct
import unicodedata
import zipfile
import zlib
from typing import IO, TYPE_CHECKING, BinaryIO, Final, cast, final

from typing_extensions import override

from service.contract.errors import Invalid, Permanent
from worker.sources.location import Tree, safe_name, visible
from worker.sources.sample import MAX_RATIO, MAX_VALUE_BYTES, RATIO_ALLOWANCE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_ENTRIES: Final = 500_000
MAX_DIRECTORY_BYTES: Final = 64 << 20
BLOCK_BYTES: Final = 1 << 20
END: Final = struct.Struct("<4s4H2LH")
LOCAL_HEADER_BYTES: Final = 30
ENCRYPTED: Final = 0x1
DAMAGE: Final = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, NotImplementedError)


@final
class ZipTree(Tree):
    """The members of a zip archive."""

    def __init__(self, stream: BinaryIO, title: str) -> None:
        """Open an archive.

        Raises Permanent if it is damaged, or if any of its entries is not a plain file with a safe name of its own.
        """
        super().__init__(title)
        self._num_bytes = _check_directory_size(stream, title)
        try:
            self._zip = zipfile.ZipFile(stream)
        except DAMAGE as error:
            raise Permanent(f"{title} is not a zip archive that can be read: {error}") from error
        self._entries = _judge(self._zip.infolist(), title)
        self._inflated = 0

    @override
    def _walk(self) -> Iterator[str]:
        return (name for name in self._entries if all(map(visible, name.split("/"))))

    @override
    def has(self, name: str) -> bool:
        return name in self._entries

    @override
    def open(self, name: str) -> BinaryIO:
        return cast("BinaryIO", io.BufferedReader(_Member(self._opened(name), f"{self.title}: {name}", self._count)))

    @override
    def head(self, name: str) -> bytes:
        return self._inflate(name, 4096)

    @override
    def read(self, name: str) -> bytes:
        if name not in self._entries:
            raise Invalid(f"there is no file {name!r}")
        data = self._inflate(name, MAX_VALUE_BYTES + 1)
        if len(data) > MAX_VALUE_BYTES:
            raise Invalid(f"{name} has more than {MAX_VALUE_BYTES} bytes")
        return data

    def _inflate(self, name: str, limit: int) -> bytes:
        """Read a member up to a limit.

        Raises Invalid if it is damaged, Permanent if the archive as a whole gives far more than it holds.
        """
        data = bytearray()
        try:
            with self._opened(name) as stream:
                while len(data) < limit and (block := stream.read(min(BLOCK_BYTES, limit - len(data)))):
                    data += block
                    self._count(len(block))
        except DAMAGE as error:
            raise Invalid(f"{name} is damaged: {error}") from error
        return bytes(data)

    def _opened(self, name: str) -> IO[bytes]:
        try:
            return self._zip.open(self._entries[name])
        except DAMAGE as error:
            raise Permanent(f"{self.title}: {name} is damaged: {error}") from error

    def _count(self, num_bytes: int) -> None:
        self._inflated += num_bytes
        if self._inflated > RATIO_ALLOWANCE_BYTES + MAX_RATIO * self._num_bytes:
            raise Permanent(
                f"{self.title}: {self._inflated} bytes came out of {self._num_bytes}, more than {MAX_RATIO} to 1"
            )


@final
class _Member(io.RawIOBase):
    """A member that is read piece by piece, and counted."""

    def __init__(self, inner: IO[bytes], title: str, count: Callable[[int], None]) -> None:
        self._inner = inner
        self._title = title
        self._count = count

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            block = self._inner.read(len(buffer))
        except DAMAGE as error:
            raise Permanent(f"{self._title} is damaged: {error}") from error
        self._count(len(block))
        buffer[: len(block)] = block
        return len(block)

    @override
    def close(self) -> None:
        self._inner.close()
        super().close()


def _check_directory_size(stream: BinaryIO, title: str) -> int:
    """Return the archive's size, having looked at how large its directory is before that is loaded."""
    num_bytes = stream.seek(0, 2)
    stream.seek(max(0, num_bytes - (1 << 16) - END.size))
    tail = stream.read()
    start = tail.rfind(b"PK\5\6")
    if start < 0 or len(tail) < start + END.size:
        raise Permanent(f"{title} is cut off: it has no zip directory")
    directory_bytes = cast("int", END.unpack_from(tail, start)[5])
    if not directory_bytes:
        raise Permanent(f"{title} holds no files")
    # 0xFFFFFFFF: the real size is in the zip64 record just before; the directory is at most what precedes it.
    if directory_bytes == 0xFFFFFFFF and (record := tail.rfind(b"PK\6\6", 0, start)) >= 0 and len(tail) > record + 48:
        (directory_bytes,) = struct.unpack_from("<Q", tail, record + 40)
    if directory_bytes > min(MAX_DIRECTORY_BYTES, num_bytes):
        raise Permanent(f"{title} has a directory of {directory_bytes} bytes: pack so many files in tar shards")
    stream.seek(0)
    return num_bytes


def _judge(infos: list[zipfile.ZipInfo], title: str) -> dict[str, zipfile.ZipInfo]:
    """Return the regular files by their names in normal form.

    Raises Permanent that names the first entry that is anything else.
    """
    if len(infos) > MAX_ENTRIES:
        raise Permanent(f"{title} has {len(infos)} entries and the limit is {MAX_ENTRIES}: pack them in tar shards")
    entries: dict[str, zipfile.ZipInfo] = {}
    seen: dict[str, str] = {}
    for info in infos:
        name = info.orig_filename
        safe = safe_name(name)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if safe is None:
            raise Permanent(f"{title}: entry {name[:200]!r} leads out of the archive or has no proper name")
        if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
            raise Permanent(f"{title}: entry {safe!r} is a link or a device")
        if info.flag_bits & ENCRYPTED:
            raise Permanent(f"{title}: entry {safe!r} is encrypted")
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise Permanent(f"{title}: entry {safe!r} is neither stored nor deflated")
        if info.is_dir() or kind == stat.S_IFDIR:
            continue
        folded = unicodedata.normalize("NFC", safe).casefold()
        if folded in seen:
            raise Permanent(f"{title}: entries {seen[folded]!r} and {safe!r} have the same name")
        seen[folded] = safe
        entries[safe] = info
    _check_overlaps(infos, title)
    return entries


def _check_overlaps(infos: list[zipfile.ZipInfo], title: str) -> None:
    """Refuse entries that share bytes: a bomb inflates the same kilobytes a thousand times."""
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise Permanent(f"{title}: entries {before!r} and {info.filename!r} overlap")
        end = info.header_offset + LOCAL_HEADER_BYTES + len(info.orig_filename.encode()) + info.compress_size
        before = info.filename
