"""Embedding sets as operands: found by id, read from the store."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import sqlalchemy as sa
from jaxtyping import Float32

from service.contract.errors import Invalid, NotFound
from service.contract.tables import embedding_set, owned
from service.contract.word import Word
from service.deps import Service
from service.resources import EmbeddingSet, embedding_set_of

VECTORS: Final = "vectors.npy"
MAX_BYTES: Final = 512 << 20
"""Of an operand: it travels to the inference process with the request."""


class Operand(Word):
    """An embedding set, and where it lies."""

    about: EmbeddingSet
    artifact: str


async def get_row(service: Service, tenant: str, set_id: str, *, param: str | None = None) -> sa.Row[Any]:
    """Return the row of an embedding set.

    Raises NotFound.
    """
    row = await service.database.read(
        lambda conn: conn.execute(owned(embedding_set, tenant).where(embedding_set.c.id == set_id)).first()
    )
    if row is None:
        raise NotFound("there is no such embedding set", param=param, code="embedding_set_not_found")
    return row


async def find(service: Service, tenant: str, set_id: str, *, param: str) -> Operand:
    """Return an embedding set that a request names.

    Raises NotFound.
    """
    row = await get_row(service, tenant, set_id, param=param)
    return Operand(about=embedding_set_of(row), artifact=row.artifact)


async def vectors(service: Service, operand: Operand, *, param: str) -> Float32[np.ndarray, "item dim"]:
    """Read the vectors of an embedding set, shape (vector, dim).

    Raises Invalid for more than a request may carry.
    """
    num_bytes = operand.about.num_vectors * operand.about.dimensions * 4
    if num_bytes > MAX_BYTES:
        raise Invalid(f"{num_bytes:,} bytes of vectors, at most {MAX_BYTES:,} in a request", param=param)

    def work() -> Float32[np.ndarray, "item dim"]:
        with service.store.open(operand.artifact, VECTORS) as stream:
            loaded: np.ndarray = np.load(stream, allow_pickle=False)
        return loaded.astype(np.float32, copy=False)

    return await service.in_file_thread(work)
