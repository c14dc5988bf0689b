"""Data sets as the worker keeps them: raw validated bytes end to end in shards, and an index of small arrays.

    shards/00000.bin ...   payloads of all modalities, sample after sample
    index.safetensors      per modality m: m.shard u16, m.offset u64, m.length u32 (N,), m.digest u8 (N, 32: SHA-256);
                           key.bytes, label.bytes u8 with key.ends, label.ends u64 (N,): UTF-8, no label is empty;
                           split u8 (N,): 0 train, 1 holdout

A payload is, per medium: image and audio: the encoded bytes as they came; text: UTF-8; discrete: npy of int32 (n,);
continuous: npy of float32 (n, dim). Opening a data set maps it into memory and reads nothing but the index's header.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast, final

import numpy as np
from jaxtyping import Int64, UInt8
from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

from service.contract.manifest import MANIFEST

SHARD_BYTES: Final = 256 << 20
MAX_SHARDS: Final = 1 << 16
DTYPES: Final = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64}
TRAIN: Final = 0
HOLDOUT: Final = 1

Split = Literal["train", "holdout", "all"]


@dataclass(frozen=True)
class Totals:
    """What was written: samples, those held out, bytes of all payloads, shards."""

    num_samples: int
    num_holdout: int
    num_bytes: int
    num_shards: int


class _Column:
    """The index of one modality while it grows."""

    def __init__(self) -> None:
        self.shard = array("H")
        self.offset = array("Q")
        self.length = array("L" if array("L").itemsize == 4 else "I")
        self.digest = bytearray()


class _Strings:
    """Strings end to end while they grow."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ends = array("Q")

    def add(self, text: str) -> None:
        self.data += text.encode()
        self.ends.append(len(self.data))


@final
class SampleWriter:
    """Write a data set into an empty folder; memory holds the index only, about 100 bytes per sample and modality.

    As a context manager it closes its files whatever happens; `close` makes the data set complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        self._columns: dict[str, _Column] = {}
        self._keys = _Strings()
        self._labels = _Strings()
        self._split = bytearray()
        self._num_shards = 0
        self._shard: BinaryIO | None = None
        self._offset = 0
        self._num_bytes = 0

    def add(self, key: str, payloads: Mapping[str, bytes], label: str, holdout: bool) -> None:  # noqa: FBT001
        """Append a sample; its payloads lie side by side.

        Raises ValueError if its modalities differ from the first sample's, or a payload is larger than a shard.
        """
        if not self._columns:
            self._columns = {name: _Column() for name in sorted(payloads)}
        if self._columns.keys() != payloads.keys():
            msg = f"sample {key!r} has the modalities {sorted(payloads)}, the data set has {sorted(self._columns)}"
            raise ValueError(msg)
        num_bytes = sum(map(len, payloads.values()))
        if num_bytes > SHARD_BYTES:
            msg = f"sample {key!r} has {num_bytes} bytes, a shard holds {SHARD_BYTES}"
            raise ValueError(msg)
        shard = self._room_for(num_bytes)
        for name, column in self._columns.items():
            payload = payloads[name]
            column.shard.append(self._num_shards - 1)
            column.offset.append(self._offset)
            column.length.append(len(payload))
            column.digest += hashlib.sha256(payload).digest()
            shard.write(payload)
            self._offset += len(payload)
        self._num_bytes += num_bytes
        self._keys.add(key)
        self._labels.add(label)
        self._split.append(HOLDOUT if holdout else TRAIN)

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()

    def close(self) -> Totals:
        """Write the index and return the totals."""
        self._close_shard()
        arrays: dict[str, np.ndarray] = {}
        for name, column in self._columns.items():
            arrays[f"{name}.shard"] = np.frombuffer(column.shard, np.uint16)
            arrays[f"{name}.offset"] = np.frombuffer(column.offset, np.uint64)
            arrays[f"{name}.length"] = np.frombuffer(column.length, np.uint32)
            arrays[f"{name}.digest"] = np.frombuffer(column.digest, np.uint8).reshape(-1, 32)
        for name, strings in (("key", self._keys), ("label", self._labels)):
            arrays[f"{name}.bytes"] = np.frombuffer(strings.data, np.uint8)
            arrays[f"{name}.ends"] = np.frombuffer(strings.ends, np.uint64)
        arrays["split"] = np.frombuffer(self._split, np.uint8)
        save_file(arrays, self.folder / "index.safetensors")
        return Totals(
            num_samples=len(self._split),
            num_holdout=self._split.count(HOLDOUT),
            num_bytes=self._num_bytes,
            num_shards=self._num_shards,
        )

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _room_for(self, num_bytes: int) -> BinaryIO:
        """Return the open shard, or a new one if this would make it too large."""
        if self._shard is None or self._offset + num_bytes > SHARD_BYTES:
            self._close_shard()
            if self._num_shards == MAX_SHARDS:
                msg = f"a data set holds at most {MAX_SHARDS} shards of {SHARD_BYTES} bytes"
                raise ValueError(msg)
            self._shard = (self.folder / "shards" / f"{self._num_shards:05d}.bin").open("wb", buffering=1 << 20)
            self._num_shards += 1
            self._offset = 0
        return self._shard


@final
class Samples:
    """A data set's directory, mapped into memory; safe to share between threads, and small to pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._arrays = map_arrays(self.folder / "index.safetensors")
        self.split: UInt8[np.ndarray, " sample"] = self._arrays["split"]
        self._columns = {
            name.removesuffix(".shard"): tuple(
                self._arrays[name.removesuffix("shard") + part] for part in ("shard", "offset", "length")
            )
            for name in self._arrays
            if name.endswith(".shard")
        }
        num_shards = max((int(shard.max()) + 1 for shard, _, _ in self._columns.values() if len(shard)), default=0)
        self._shards = [_map_file(self.folder / "shards" / f"{number:05d}.bin") for number in range(num_shards)]

    def __len__(self) -> int:
        return len(self.split)

    def __reduce__(self) -> tuple[type[Samples], tuple[Path]]:
        return Samples, (self.folder,)

    @cached_property
    def body(self) -> dict[str, Any]:
        """What ingest found: the manifest's body."""
        return cast("dict[str, Any]", json.loads((self.folder / MANIFEST).read_bytes())["body"])

    @cached_property
    def modalities(self) -> dict[str, str]:
        """Modality -> medium."""
        return cast("dict[str, str]", self.body["modalities"])

    def payload(self, modality: str, index: int) -> bytes:
        """Return the raw bytes of one modality of a sample.

        Raises KeyError for an unknown modality, IndexError past the end.
        """
        shard, offset, length = self._columns[modality]
        start = int(offset[index])
        return self._shards[int(shard[index])][start : start + int(length[index])]

    def digest(self, modality: str, index: int) -> bytes:
        """Return the SHA-256 of a payload."""
        return self._arrays[f"{modality}.digest"][index].tobytes()

    def key(self, index: int) -> str:
        """Return a sample's key."""
        return self._string("key", index)

    def label(self, index: int) -> str:
        """Return a sample's class label; empty if it has none."""
        return self._string("label", index)

    def indices(self, split: Split) -> Int64[np.ndarray, " sample"]:
        """Return the samples of a split, ascending."""
        if split == "all":
            return np.arange(len(self), dtype=np.int64)
        return np.flatnonzero(self.split == (HOLDOUT if split == "holdout" else TRAIN)).astype(np.int64)

    def _string(self, name: str, index: int) -> str:
        ends = self._arrays[f"{name}.ends"]
        position = range(len(ends))[index]
        start = int(ends[position - 1]) if position else 0
        return self._arrays[f"{name}.bytes"][start : int(ends[position])].tobytes().decode()


def _map_file(path: Path) -> mmap.mmap:
    with path.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Map a safetensors file of unsigned integers; nothing is copied."""
    mapped = _map_file(path)
    (header_bytes,) = struct.unpack_from("<Q", mapped)
    header = cast("dict[str, dict[str, Any]]", json.loads(mapped[8 : 8 + header_bytes]))
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        count = (end - start) // dtype.itemsize
        flat = np.frombuffer(mapped, dtype, count, 8 + header_bytes + start) if count else np.empty(0, dtype)
        arrays[name] = flat.reshape(entry["shape"])
    return arrays
