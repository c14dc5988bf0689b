"""Embedding sets as operands: mapped from the store, so that their pages are the kernel's, not this process's."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, final

import numpy as np

from service.contract.errors import Invalid, Permanent, Unavailable
from service.contract.vectors import PARQUET, Strings, Vectors
from worker.serving.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jaxtyping import Float32

    from service.contract.losses import Critic
    from service.contract.store import Store
    from service.contract.wire import SetRef

KNOWN: Final = 4096
OPEN_BYTES: Final = 64 << 20  # of sets that stay open: their files take space as long, also when they were deleted
CHECKED_BYTES: Final = 8 << 20  # looked at in one go: what that takes is a few times as much


@final
class Sets:
    """Opens embedding sets; every one is looked through once, since artifacts never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sound: OrderedDict[tuple[str, Critic], None] = OrderedDict()
        self._open_still: Recent[Vectors] = Recent(OPEN_BYTES)

    async def open(self, refs: Mapping[str, SetRef]) -> dict[str, Vectors]:
        """Map the sets of a call; a set is open until nobody holds it, also after somebody has deleted it.

        Small ones stay open for the next call. Raises NotFound for one that is gone, Unavailable for one that is
        damaged.
        """
        return {
            name: self._open_still.get(ref.artifact) or await asyncio.to_thread(self._open, ref)
            for name, ref in refs.items()
        }

    async def check(self, ref: SetRef, vectors: Float32[np.ndarray, "row dim"], critic: Critic, *, param: str) -> None:
        """Raise Invalid for the first vector that the critic cannot compare."""
        key = (ref.artifact, critic)
        if key not in self._sound:
            await asyncio.to_thread(check_vectors, vectors, critic, param=param)
            self._sound[key] = None
            if len(self._sound) > KNOWN:
                self._sound.popitem(last=False)

    def _open(self, ref: SetRef) -> Vectors:
        try:
            found = open_vectors(self._store.local(ref.artifact))
        except Permanent as error:
            raise Unavailable(error.message, code=error.code) from error
        self._open_still.put(ref.artifact, found, found.z.nbytes)
        return found


def open_vectors(folder: Path) -> Vectors:
    """Map the directory of an embedding set; the keys of a set of earlier versions are read from its table.

    Raises Permanent if it cannot be read.
    """
    found = Vectors(folder)
    if found.keys is None and (folder / PARQUET).exists():
        import pyarrow.parquet as pq  # noqa: PLC0415  # 40 MB that hardly any inference process needs

        found.keys = Strings.of(pq.read_table(folder / PARQUET, columns=["key"])["key"].to_pylist())
    return found


def check_vectors(vectors: Float32[np.ndarray, "row dim"], critic: Critic, *, param: str) -> None:
    """Raise Invalid for the first vector that is not finite, or that the cosine finds no direction in."""
    num_rows = max(1, CHECKED_BYTES // (4 * max(1, vectors.shape[1])))
    for start in range(0, len(vectors), num_rows):
        lengths = np.linalg.norm(vectors[start : start + num_rows], axis=1)
        is_bad = ~np.isfinite(lengths) | (lengths == 0) if critic == "cosine" else ~np.isfinite(lengths)
        if len(bad := np.flatnonzero(is_bad)):
            what = "has no direction" if critic == "cosine" else "is not finite"
            at = f"{param}[{start + int(bad[0])}]"
            raise Invalid(f"{at} {what}", param=at)
