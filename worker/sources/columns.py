"""Columns: what the fields of a CSV, JSONL or Parquet row are to their sample.

Unless the caller maps modalities to columns, they are recognised: `image` and `audio` hold a path relative to the
table, base64, a data: URI or bytes; `text` or `caption` holds text; a column of another name whose value is a list of
numbers is tokens of that modality. `label` or `cls` is the label, `key` or `id` the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from service.contract.errors import Invalid, Permanent
from service.contract.tokens.uri import data_uri, strict_base64
from service.contract.word import MODALITY
from worker.sources.location import safe_name
from worker.sources.members import EXTENSIONS, split_name
from worker.sources.sample import MAX_VALUE_BYTES, Kind, Raw, Value, Wanted, plain, signature

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from worker.sources.location import Tree

MEDIA: Final[dict[str, Kind]] = {"image": "image", "audio": "audio", "text": "text", "caption": "text"}
LABELS: Final = ("label", "cls")
KEYS: Final = ("key", "id", "__key__")
SPLIT: Final = "split"


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table are what; `tokens` may become modalities if they hold lists of numbers."""

    modalities: dict[str, str]
    tokens: tuple[str, ...]
    label: str | None
    key: str | None
    fields: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Name every column that has to be read, once."""
        singles = [name for name in (self.label, self.key) if name is not None]
        return list(dict.fromkeys([*self.modalities.values(), *self.tokens, *singles, *self.fields]))


def plan(names: Iterable[str], wanted: Wanted, title: str) -> Columns:
    """Decide what the columns of a table are.

    Raises Permanent if a column that the caller named is not there, or two claim one modality.
    """
    names = list(names)
    modalities: dict[str, str] = {}
    if wanted.mapping is not None:
        if missing := [column for column in wanted.mapping.values() if column not in names]:
            shown = ", ".join(repr(name) for name in names[:20])
            raise Permanent(f"{title} has no column {missing[0]!r}; it has {shown}")
        modalities = dict(wanted.mapping)
    else:
        for column in names:
            if (kind := MEDIA.get(column.lower())) is None:
                continue
            if kind in modalities:
                raise Permanent(
                    f"{title}: columns {modalities[kind]!r} and {column!r} are both {kind}: name one in `modalities`"
                )
            modalities[kind] = column
    taken = {*modalities.values(), *LABELS, *KEYS, *wanted.fields, SPLIT}
    tokens = () if wanted.mapping is not None else tuple(n for n in names if n not in taken and MODALITY.match(n))
    return Columns(
        modalities=modalities,
        tokens=tokens,
        label=next((name for name in LABELS if name in names and name not in modalities.values()), None),
        key=next((name for name in KEYS if name in names), None),
        fields=tuple(name for name in sorted(wanted.fields) if name in names),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: the key it has unless a column gives one, its name for people, the table's folder."""

    key: str
    name: str
    tree: Tree
    base: str


def row(record: Mapping[str, object], columns: Columns, place: Place) -> Raw:
    """Make a sample of a row."""
    key = (plain(record.get(columns.key)) if columns.key is not None else "") or place.key
    try:
        values = {
            modality: value
            for modality, column in columns.modalities.items()
            if (value := _value(modality, column, record.get(column), place)) is not None
        }
        for name in columns.tokens:
            if name not in values and (numbers := _numbers(record.get(name))) is not None:
                values[name] = Value("list", numbers)
    except Invalid as error:
        return Raw(key, problem=f"{place.name}: {error.message}")
    label = plain(record.get(columns.label)) if columns.label is not None else ""
    fields = {name: plain(record[name]) for name in columns.fields if record.get(name) is not None}
    return Raw(key, values, label, fields)


def _value(modality: str, column: str, cell: object, place: Place) -> Value | None:
    """Read a cell; None if it is empty."""
    kind = MEDIA.get(modality) or MEDIA.get(column.lower())
    if isinstance(cell, dict):
        # How Hugging Face keeps media: the bytes, or the path of a file beside the table.
        struct = cast("dict[str, object]", cell)
        cell = struct.get("bytes") or struct.get("path")
    match cell:
        case None | "" | b"":
            return None
        case bytes():
            return Value(kind or signature(cell), cell)
        case str() if kind == "text":
            return Value("text", cell)
        case str():
            return _media(kind, column, cell, place)
        case _ if kind != "text" and (numbers := _numbers(cell)) is not None:
            return Value("list", numbers)
        case int() | float() if kind == "text":
            return Value("text", plain(cell))
        case _:
            raise Invalid(f"column {column!r} holds a {type(cell).__name__}, which is no {modality}")


def _media(kind: Kind | None, column: str, text: str, place: Place) -> Value:
    """Read the bytes that a string stands for: a data: URI, a file of the tree, or base64."""
    if (uri := data_uri(text)) is not None:
        return Value(kind or signature(uri.data), uri.data)
    path = safe_name(text)
    if path is not None and place.tree.has(place.base + path):
        data = place.tree.read(place.base + path)
        return Value(kind or EXTENSIONS.get(split_name(path)[1]) or signature(data), data)
    if kind is None:
        return Value("text", text)
    try:
        if len(text) > MAX_VALUE_BYTES * 4 // 3:
            raise Invalid("too large")  # noqa: TRY301
        return Value(kind, strict_base64(text))
    except Invalid:
        shown = text if len(text) <= 80 else text[:77] + "..."
        reason = "leads out of the data set" if path is None else "is not in the data set"
        raise Invalid(f"{column} {shown!r} {reason}, and it is no base64") from None


def _numbers(cell: object) -> object | None:
    """Return a list of numbers as it came, or None for whatever else a cell holds."""
    if isinstance(cell, np.ndarray):
        return cast("object", cell)
    if isinstance(cell, list) and cell:
        first = cast("object", cell[0])
        if isinstance(first, list) and first:
            first = cast("object", first[0])
        if isinstance(first, int | float) and not isinstance(first, bool):
            return cast("object", cell)
    return None
