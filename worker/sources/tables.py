"""Tables of text: CSV and JSONL with a row per sample, read line by line; a bad row is named by its line number."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, BinaryIO, Final, cast, final

from service.contract.errors import Permanent
from worker.sources.columns import Columns, Place, plan, row
from worker.sources.sample import MAX_VALUE_BYTES, Raw, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.sources.location import Tree

MAX_LINE_BYTES: Final = 2 * MAX_VALUE_BYTES
MAX_COLUMNS: Final = 1000
SAMPLE_LINES: Final = 100
BOM: Final = b"\xef\xbb\xbf"


def looks_like_jsonl(head: bytes) -> bool:
    """Tell whether text begins with a JSON object."""
    return head.removeprefix(BOM).lstrip().startswith(b"{")


def header_of(head: bytes) -> list[str]:
    """Return the cells of the first line, read as CSV; none if it is not text."""
    line, newline, _ = head.removeprefix(BOM).partition(b"\n")
    if not newline or b"\0" in line:
        return []
    try:
        text = line.decode()
        return [cell.strip() for cell in next(csv.reader([text], delimiter=_delimiter(text)), [])]
    except (UnicodeDecodeError, csv.Error):
        return []


def read_table(tree: Tree, name: str, wanted: Wanted, *, prefix: str) -> Iterator[Raw]:
    """Read samples from a CSV or JSONL file; keys that no column gives are `prefix` and the line number.

    Raises Permanent for a line that is too long, and for a header that does not fit.
    """
    head = tree.head(name)
    base = name[: name.rfind("/") + 1]
    with tree.open(name) as stream:
        lines = _Lines(stream, name)
        reader = _jsonl if looks_like_jsonl(head) else _csv
        yield from reader(lines, tree, base, wanted, prefix)


@final
class _Lines:
    """Lines of bounded length, counted; bytes that are not UTF-8 become surrogates, which no sample may hold."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self.name = name
        self.number = 0
        self.record_bytes = 0
        self.ended = False

    def since(self, start: int) -> str:
        """Name the lines of a record for people."""
        return f"line {start}" if self.number <= start else f"lines {start} to {self.number}"

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            self.ended = True
            raise StopIteration
        self.number += 1
        self.record_bytes += len(line)
        if self.record_bytes > MAX_LINE_BYTES:
            raise Permanent(f"{self.name}, line {self.number}: more than {MAX_LINE_BYTES} bytes in one row")
        if self.number == 1:
            line = line.removeprefix(BOM)
        return line.decode("utf-8", "surrogateescape")


def _csv(lines: _Lines, tree: Tree, base: str, wanted: Wanted, prefix: str) -> Iterator[Raw]:
    csv.field_size_limit(MAX_LINE_BYTES)
    first = next(lines, "")
    delimiter = _delimiter(first)
    try:
        names = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
    except csv.Error as error:
        raise Permanent(f"{lines.name}, line 1: {error}") from error
    if len(names) > MAX_COLUMNS or len(set(names)) < len(names):
        raise Permanent(f"{lines.name}, line 1: the header needs at most {MAX_COLUMNS} columns, each of its own name")
    columns = plan(names, wanted, lines.name)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start, lines.record_bytes = lines.number + 1, 0
        key = f"{prefix}{start:08d}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if lines.ended:
                # A quote without its partner swallowed the rest: one bad row would hide all that follow.
                raise Permanent(f"{lines.name}, line {start}: {error} (a quote that is never closed)") from error
            yield Raw(key, problem=f"{lines.since(start)}: {error}")
            continue
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != len(names):
            yield Raw(key, problem=f"{lines.since(start)}: {len(cells)} cells where the header has {len(names)}")
        elif not all(cell.isascii() or _is_unicode(cell) for cell in cells):
            yield Raw(key, problem=f"{lines.since(start)}: not UTF-8")
        else:
            record: dict[str, object] = dict(zip(names, cells, strict=True))
            record.update({name: _listed(record[name]) for name in columns.tokens})
            yield row(record, columns, Place(key, lines.since(start), tree, base))


def _jsonl(lines: _Lines, tree: Tree, base: str, wanted: Wanted, prefix: str) -> Iterator[Raw]:
    waiting: list[tuple[int, dict[str, object] | str]] = []
    columns: Columns | None = None
    for line in lines:
        lines.record_bytes = 0
        if not line.strip():
            continue
        waiting.append((lines.number, _object(line)))
        # The first lines together say which columns there are: a row may leave out what it does not have.
        if columns is None and len(waiting) < SAMPLE_LINES:
            continue
        columns = columns or _plan(waiting, wanted, lines.name)
        yield from _rows(waiting, columns, tree, base, prefix)
        waiting.clear()
    if waiting:
        yield from _rows(waiting, columns or _plan(waiting, wanted, lines.name), tree, base, prefix)


def _plan(records: list[tuple[int, dict[str, object] | str]], wanted: Wanted, name: str) -> Columns:
    names = dict.fromkeys(key for _, record in records if isinstance(record, dict) for key in record)
    return plan(list(names)[:MAX_COLUMNS], wanted, name)


def _rows(
    records: list[tuple[int, dict[str, object] | str]], columns: Columns, tree: Tree, base: str, prefix: str
) -> Iterator[Raw]:
    for number, record in records:
        key, place = f"{prefix}{number:08d}", f"line {number}"
        if isinstance(record, str):
            yield Raw(key, problem=f"{place}: {record}")
        else:
            yield row(record, columns, Place(key, place, tree, base))


def _object(line: str) -> dict[str, object] | str:
    """Parse a line, or say what is wrong with it."""
    if not line.isascii() and not _is_unicode(line):
        return "not UTF-8"
    try:
        parsed: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}" if len(str(error)) < 200 else "not JSON"
    return cast("dict[str, object]", parsed) if isinstance(parsed, dict) else "no JSON object"


def _listed(cell: object) -> object:
    """Read a cell such as `[1, 2, 3]`; what is no list stays as it is."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            return cast("object", json.loads(cell))
        except (ValueError, RecursionError):
            return cell
    return cell


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _delimiter(header: str) -> str:
    """Choose the separator that the header has most of; a comma if it has none."""
    return max(",\t;", key=header.count)
