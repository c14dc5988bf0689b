"""The directory of an embedding set, and how it is read: memory-mapped, so that opening a million vectors is cheap.

    vectors.npy            float32 (N, dim)
    embeddings.parquet     key, label, split, vector: for tools of others; nothing here reads it
    index.safetensors      key.bytes u8 with key.ends u64 (N,): UTF-8, row for row with the vectors

Sets of earlier versions have no index: their keys are in the Parquet file alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Final, final

import numpy as np
from jaxtyping import Float32, Integer, UInt8, UInt64
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from service.contract.errors import Permanent
from service.contract.samples import map_arrays

VECTORS: Final = "vectors.npy"
PARQUET: Final = "embeddings.parquet"
INDEX: Final = "index.safetensors"


@final
class Strings:
    """Strings end to end in one array of bytes; `ends` says where each of them stops."""

    def __init__(self, data: UInt8[np.ndarray, " byte"], ends: UInt64[np.ndarray, " string"]) -> None:
        self.data, self.ends = data, ends

    @staticmethod
    def of(texts: Iterable[str]) -> Strings:
        """Put strings end to end."""
        encoded = [text.encode() for text in texts]
        ends = np.cumsum([len(each) for each in encoded], dtype=np.uint64)
        return Strings(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, rows: Integer[np.ndarray, " row"]) -> Strings:
        """Return the strings of some rows; others are not looked at."""
        starts = np.where(rows > 0, self.ends[rows - 1], 0).astype(np.int64)
        lengths = self.ends[rows].astype(np.int64) - starts
        ends = np.cumsum(lengths)
        at = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
        return Strings(self.data[at], ends.astype(np.uint64))

    def decoded(self) -> list[str]:
        """Return them as strings."""
        whole, begins = self.data.tobytes(), [0, *self.ends.tolist()]
        return [whole[begin:end].decode() for begin, end in pairwise(begins)]


@final
class Vectors:
    """An embedding set's directory, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        """Map it.

        Raises Permanent if what lies there is no embedding set.
        """
        try:
            self.z: Float32[np.ndarray, "row dim"] = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            index = map_arrays(folder / INDEX) if (folder / INDEX).exists() else None
        except (OSError, ValueError) as error:
            raise Permanent(f"{folder.name} is no embedding set that can be read", code="damaged") from error
        if self.z.ndim != 2 or self.z.dtype != np.float32:
            raise Permanent("an embedding set is a matrix of float32 vectors", code="damaged")
        self.keys = None if index is None else Strings(index["key.bytes"], index["key.ends"])

    def __len__(self) -> int:
        return len(self.z)


def write_index(folder: Path, keys: Strings) -> None:
    """Write the keys of a set's rows, in their order."""
    save_file({"key.bytes": keys.data, "key.ends": keys.ends}, folder / INDEX)
