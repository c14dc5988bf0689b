"""WebDataset: tar shards read as a stream, in constant memory. Regular files only, and nothing is ever extracted."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from itertools import groupby
from typing import TYPE_CHECKING, BinaryIO, Final, final

from typing_extensions import override

from service.contract.errors import Invalid, Permanent
from service.contract.samples import SHARD_BYTES
from worker.sources.location import safe_name, visible
from worker.sources.members import assemble, of_interest, role_of, split_name
from worker.sources.sample import MAX_RATIO, MAX_VALUE_BYTES, RATIO_ALLOWANCE_BYTES, Raw, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.sources.location import Tree

MAX_EXTENSION_BYTES: Final = 1 << 20
EXTENSION_HEADERS: Final = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
# TypeError: what Python's reader says of a gzip header that is cut off.
DAMAGE: Final = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, TypeError, RecursionError)

Member = tuple[str, str, bytes | None, str | None]
"""Key, extension, content, and what is wrong with it."""


class _Damaged(Exception):
    """Not of tarfile's family: that would be taken for the end of the archive."""


@final
class _Header(tarfile.TarInfo):
    """A header that refuses what Python's reader lets pass."""

    @classmethod
    @override
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise _Damaged(str(error)) from error
        if header.size < 0 or (header.type in EXTENSION_HEADERS and header.size > MAX_EXTENSION_BYTES):
            raise _Damaged(f"a header claims {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise _Damaged("sparse members are not read")
        return header


def read_shards(tree: Tree, names: list[str], wanted: Wanted) -> Iterator[Raw]:
    """Read samples from tar shards: consecutive members of one key are a sample.

    Raises Permanent that names the shard, and the last good member, if one is damaged or grows out of all proportion.
    """
    for name in names:
        with tree.open(name) as stream:
            members = _members(stream, name, wanted)
            for key, group in groupby(members, key=lambda member: member[0]):
                if (sample := _sample(key, group, wanted)) is not None:
                    yield sample


def _sample(key: str, group: Iterator[Member], wanted: Wanted) -> Raw | None:
    contents: dict[str, bytes] = {}
    problem: str | None = None
    for _, extension, content, wrong in group:
        problem = problem or wrong
        if extension in contents:
            problem = problem or f"two members are {extension}"
        if content is not None:
            contents[extension] = content
        if sum(map(len, contents.values())) > SHARD_BYTES:
            contents.clear()
            problem = f"its members have more than {SHARD_BYTES} bytes"
    if problem is not None:
        return Raw(key, problem=problem)
    if not any(role_of(extension, wanted.mapping) for extension in contents):
        return None
    return assemble(key, list(contents), contents.__getitem__, wanted)


def _members(stream: BinaryIO, shard: str, wanted: Wanted) -> Iterator[Member]:
    last = "its start"
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header, bufsize=1 << 18) as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # Python keeps every header it has seen
                last = info.name
                # What came out so far, against what the stream gave for it.
                if info.offset > RATIO_ALLOWANCE_BYTES + MAX_RATIO * max(1, stream.tell()):
                    raise Permanent(f"{shard}: more than {MAX_RATIO} bytes come out of one, at {last[:200]!r}")
                if (member := _member(archive, info, wanted)) is not None:
                    yield member
    except (_Damaged, *DAMAGE) as error:
        raise Permanent(f"{shard} is damaged after {last[:200]!r}: {error}") from error
    except OSError as error:
        # Faults of the stream come as Transient or Permanent; this one is bz2's word for damage.
        raise Permanent(f"{shard} is damaged after {last[:200]!r}: {error}") from error


def _member(archive: tarfile.TarFile, info: tarfile.TarInfo, wanted: Wanted) -> Member | None:
    name = info.name.removeprefix("./")
    if (info.isdir() or not all(map(visible, name.split("/")))) and ".." not in name.split("/"):
        return None
    key, extension = split_name(name)
    if safe_name(name) != name:
        return key, extension, None, f"member {name[:200]!r} has no proper name"
    if not info.isreg() or info.issparse():
        return key, extension, None, f"member {name!r} is a link or a device"
    if not of_interest(extension, wanted):
        return None
    if info.size > MAX_VALUE_BYTES:
        return key, extension, None, f"member {name!r} has {info.size} bytes and the limit is {MAX_VALUE_BYTES}"
    content = archive.extractfile(info)
    if content is None:
        raise Invalid(f"member {name!r} has no content")
    data = content.read()
    if len(data) != info.size:
        raise _Damaged(f"{name!r} is cut off")
    return key, extension, data, None
