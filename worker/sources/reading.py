"""Read a source: what it is decides its content, never its name."""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Final, Literal, cast

from service.contract.errors import Invalid, Permanent
from worker.sources.columns import KEYS, LABELS, MEDIA
from worker.sources.location import Tree, locate
from worker.sources.members import check_mapping, of_interest, read_members, role_of, split_name
from worker.sources.sample import Raw, Wanted
from worker.sources.shards import read_shards
from worker.sources.tables import BOM, header_of, looks_like_jsonl, read_table
from worker.sources.zipped import ZipTree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.contract.artifacts import Store

LOOKS_PER_EXTENSION: Final = 3
MAX_LOOKS: Final = 300
COMPRESSED: Final = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")

Format = Literal["zip", "parquet", "tar", "table", "other"]


def read_source(uri: str, store: Store, wanted: Wanted) -> Iterator[Raw]:
    """Read the samples of a source, one after the other, in constant memory.

    Raises Permanent for what cannot be a data set, naming the place, and Transient for trouble on the way to it.
    """
    check_mapping(wanted.mapping)
    return _read_tree(locate(uri, store), wanted, inside=False)


def format_of(head: bytes) -> Format:
    """Tell what a file is by its first 4 kB; a table is text that starts like JSONL or like CSV with a header."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(COMPRESSED) or _is_tar_header(head):
        return "tar"
    if looks_like_jsonl(head) or header_of(head):
        return "table"
    return "other"


def _read_tree(tree: Tree, wanted: Wanted, *, inside: bool) -> Iterator[Raw]:
    names = list(tree.names)
    formats = _look(tree, names)
    by_format: dict[Format, list[str]] = {}
    for name in names:
        by_format.setdefault(formats[_extension(name)], []).append(name)
    if inside and (packed := [name for name in names if formats[_extension(name)] in {"zip", "tar", "parquet"}]):
        raise Permanent(f"{tree.title}: {packed[0]} is an archive within a zip, and is not read")
    if shards := by_format.get("tar"):
        yield from read_shards(tree, shards, wanted)
    elif files := by_format.get("parquet"):
        # Here, so that only this format loads pyarrow.
        from worker.sources.parquet import read_parquet  # noqa: PLC0415

        yield from read_parquet(tree, files, wanted)
    elif archives := by_format.get("zip"):
        for name in archives:
            with tree.open(name) as stream:
                yield from _read_tree(ZipTree(stream, name), wanted, inside=True)
    elif tables := _tables(tree, names, formats, wanted):
        for name in tables:
            prefix = f"{split_name(name)[0]}/" if len(tables) > 1 else ""
            yield from read_table(tree, name, wanted, prefix=prefix)
    elif any(of_interest(split_name(name)[1], wanted) for name in names):
        yield from read_members(tree, wanted)
    else:
        raise Permanent(f"{tree.title} is no tar, zip, Parquet, CSV or JSONL, nor a folder of such files or of samples")


def _look(tree: Tree, names: list[str]) -> dict[str, Format]:
    """Look into a few files of every extension: a folder of a million images is not opened a million times."""
    looks: dict[str, list[str]] = {}
    for name in names:
        chosen = looks.setdefault(_extension(name), [])
        if len(chosen) < LOOKS_PER_EXTENSION:
            chosen.append(name)
    if len(looks) * LOOKS_PER_EXTENSION > MAX_LOOKS:
        looks = {extension: chosen[:1] for extension, chosen in looks.items()}
    return {extension: _agreed([_format(tree, name) for name in chosen]) for extension, chosen in looks.items()}


def _agreed(formats: list[Format]) -> Format:
    return formats[0] if len(set(formats)) == 1 else "other"


def _format(tree: Tree, name: str) -> Format:
    try:
        return format_of(tree.head(name))
    except Invalid:
        return "other"  # a damaged member or a stray link: its sample will say so


def _tables(tree: Tree, names: list[str], formats: dict[str, Format], wanted: Wanted) -> list[str]:
    """Find the tables among text files: alone under their key, and with a column that we know."""
    texts = [name for name in names if formats[_extension(name)] == "table"]
    siblings: dict[str, int] = {}
    for name in names:
        key = split_name(name)[0]
        siblings[key] = siblings.get(key, 0) + 1
    if len(names) == 1:
        return texts
    return [
        name
        for name in texts
        if siblings[split_name(name)[0]] == 1
        and role_of(split_name(name)[1], wanted.mapping) is None
        and _has_known_column(tree.head(name), wanted)
    ]


def _has_known_column(head: bytes, wanted: Wanted) -> bool:
    known = set(wanted.mapping.values()) if wanted.mapping is not None else {*MEDIA, *LABELS, *KEYS}
    if not looks_like_jsonl(head):
        return any(name in known or name.lower() in known for name in header_of(head))
    line, newline, _ = head.removeprefix(BOM).lstrip().partition(b"\n")
    if not newline:
        return True  # a first row too long to look at; a document that is laid out for people breaks its lines
    try:
        parsed: object = json.loads(line)
    except (ValueError, RecursionError):
        return False
    row = cast("dict[str, object]", parsed) if isinstance(parsed, dict) else {}
    return any(name.lower() in known or name in known or isinstance(value, list) for name, value in row.items())


def _extension(name: str) -> str:
    return split_name(name)[1].rpartition(".")[2]


def _is_tar_header(head: bytes) -> bool:
    if len(head) < tarfile.BLOCKSIZE:
        return False
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True
