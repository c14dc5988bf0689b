"""Embedding sets as operands: found by id, held against the model that reads them. Their vectors stay in the store."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from service.catalogue import Model
from service.contract.errors import Invalid, NotFound
from service.contract.tables import embedding_set, owned
from service.contract.word import Word
from service.deps import Service
from service.resources import EmbeddingSet, embedding_set_of


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


def check(about: EmbeddingSet, model: Model, modality: str | None, *, param: str) -> None:
    """Raise Invalid for vectors that another model made, or of another modality than is expected."""
    if about.model_digest != model.ref.digest:
        raise Invalid("these vectors were made by another model", param=param, code="model_differs")
    if modality is not None and about.modality != modality:
        raise Invalid(f"these vectors are of {about.modality}, not {modality}", param=param)
    if about.dimensions != model.dimensions:
        raise Invalid(f"vectors of {about.dimensions} values; the model's have {model.dimensions}", param=param)


def check_size(about: EmbeddingSet, max_bytes: int, *, param: str) -> None:
    """Raise Invalid for a set that is too large to be held at once."""
    num_bytes = 4 * about.num_vectors * about.dimensions
    if num_bytes > max_bytes:
        raise Invalid(f"a bridge of {num_bytes:,} bytes of vectors, at most {max_bytes:,}", param=param)


async def check_same_samples(service: Service, operands: list[Operand]) -> None:
    """Raise Invalid for sets whose rows are not the same samples in the same order."""

    def work() -> list[tuple[Any, ...]]:
        bodies = [service.store.manifest(each.artifact).body for each in operands]
        return [(body.get("dataset_digest"), body.get("split"), body.get("num_vectors")) for body in bodies]

    first, *others = await service.in_file_thread(work)
    if None in first or any(each != first for each in others):
        raise Invalid(
            "row for row the sets of a bridge hold the same samples: embed one split of one data set with each model",
            param="through",
            code="bridge_sets",
        )
