"""Parquet, read in small batches. The only module of ingest that loads pyarrow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from service.contract.errors import Permanent
from worker.sources.columns import Columns, Place, plan, row
from worker.sources.sample import MAX_RATIO, RATIO_ALLOWANCE_BYTES, Raw, Wanted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.sources.location import Tree

BATCH_ROWS: Final = 32
MAX_COLUMNS: Final = 1000
MAX_GROUP_BYTES: Final = 4 << 30
MAX_THRIFT_BYTES: Final = 64 << 20


def read_parquet(tree: Tree, names: list[str], wanted: Wanted) -> Iterator[Raw]:
    """Read samples from Parquet files; keys that no column gives are the file's name and the row number, from 0.

    Raises Permanent that names the file, and the row, where one is damaged.
    """
    for name in names:
        with tree.open(name) as stream:
            prefix = f"{name.rpartition('/')[2].partition('.')[0]}/" if len(names) > 1 else ""
            yield from _read(_open(stream, name), tree, name, wanted, prefix)


def _open(stream: BinaryIO, name: str) -> pq.ParquetFile:
    """Open a file, having looked at what its directory claims.

    Raises Permanent if it cannot be read.
    """
    num_bytes = stream.seek(0, 2)
    try:
        file = pq.ParquetFile(stream, thrift_string_size_limit=MAX_THRIFT_BYTES, thrift_container_size_limit=1 << 20)
        # No look at single columns: a damaged one makes pyarrow end the process.
        groups = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Permanent(f"{name} is not a Parquet file that can be read: {_short(error)}") from error
    if max(groups, default=0) > MAX_GROUP_BYTES or sum(groups) > RATIO_ALLOWANCE_BYTES + MAX_RATIO * num_bytes:
        raise Permanent(f"{name} unpacks to {sum(groups)} bytes from {num_bytes}: write it with smaller row groups")
    return file


def _read(file: pq.ParquetFile, tree: Tree, name: str, wanted: Wanted, prefix: str) -> Iterator[Raw]:
    schema = file.schema_arrow
    if len(schema.names) > MAX_COLUMNS:
        raise Permanent(f"{name} has {len(schema.names)} columns and the limit is {MAX_COLUMNS}")
    if len(set(schema.names)) < len(schema.names):
        raise Permanent(f"{name} has two columns of one name")
    columns = _drop_others(plan(schema.names, wanted, name), schema)
    base, classes = name[: name.rfind("/") + 1], _class_names(schema, columns)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns.all, use_threads=False):
            arrays = {column: _cells(batch.column(column)) for column in batch.schema.names}
            for index in range(batch.num_rows):
                record = {column: cells[index] for column, cells in arrays.items()}
                if classes and columns.label is not None and isinstance(label := record[columns.label], int):
                    record[columns.label] = classes[label] if 0 <= label < len(classes) else label
                yield row(record, columns, Place(f"{prefix}{number:08d}", f"row {number}", tree, base))
                number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Permanent(f"{name} is damaged after row {number}: {_short(error)}") from error


def _drop_others(columns: Columns, schema: pa.Schema) -> Columns:
    """Keep as tokens only the columns that hold lists of numbers."""
    tokens = tuple(column for column in columns.tokens if _is_numbers(schema.field(column).type))
    return Columns(columns.modalities, tokens, columns.label, columns.key, columns.fields)


def _is_numbers(kind: pa.DataType) -> bool:
    if not _is_list(kind):
        return False
    inner = cast("Any", kind).value_type
    if _is_list(inner):
        inner = inner.value_type
    return pa.types.is_integer(inner) or pa.types.is_floating(inner)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _cells(column: pa.Array) -> list[object]:
    """Turn a column into Python values; flat lists of numbers into arrays, which is far faster."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if _is_list(kind) and _is_numbers(kind) and not _is_list(cast("Any", kind).value_type):
        return [None if not cell.is_valid else cell.values.to_numpy(zero_copy_only=False) for cell in column]
    return cast("list[object]", column.to_pylist())


def _class_names(schema: pa.Schema, columns: Columns) -> list[str]:
    """Return the names behind the label's numbers, as Hugging Face writes them into the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None or columns.label is None or len(text) > RATIO_ALLOWANCE_BYTES:
        return []
    try:
        names: object = json.loads(text)["info"]["features"][columns.label]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return [str(name) for name in cast("list[object]", names)] if isinstance(names, list) else []


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
