"""Vectors of class prompts, kept by content: the labels of a classifier are the same in every request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Final, final

import numpy as np
from jaxtyping import Float32
from pydantic import TypeAdapter

from service.contract.items import AnyItem, Item

MAX_BYTES: Final = 64 << 20
ENTRY_BYTES: Final = 512
"""Of a prompt beside its vector: its key, its place, and the objects around them."""

_item: TypeAdapter[AnyItem] = TypeAdapter(Item)
Known = tuple[str, Float32[np.ndarray, " dim"]]


@final
class LabelCache:
    """The least recently used prompts' vectors, each with its modality; 64 MiB."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self.hits = 0
        self.misses = 0

    @staticmethod
    def key(model_digest: str, item: AnyItem, *, truncate: bool) -> bytes:
        """Return the key of an item under a model."""
        digest = hashlib.sha256(f"{model_digest}\0{truncate:d}\0".encode())
        digest.update(_item.dump_json(item))
        return digest.digest()

    def get(self, key: bytes) -> Known | None:
        """Return the modality and the vector of a prompt."""
        if (known := self._known.get(key)) is None:
            self.misses += 1
            return None
        self.hits += 1
        self._known.move_to_end(key)
        return known

    def put(self, key: bytes, modality: str, vector: Float32[np.ndarray, " dim"]) -> None:
        """Keep a prompt's vector, dropping old ones to make room."""
        if key in self._known:
            return
        own = vector.copy()  # a row of a batch would keep the whole batch
        self._known[key] = (modality, own)
        self._num_bytes += own.nbytes + ENTRY_BYTES
        while self._num_bytes > self._max_bytes:
            _, (_, dropped) = self._known.popitem(last=False)
            self._num_bytes -= dropped.nbytes + ENTRY_BYTES
