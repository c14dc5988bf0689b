"""Embedding sets as operands, held against the model that reads them. Their vectors stay in the store."""

from __future__ import annotations

from typing import Any

from service.catalogue import Model
from service.contract.errors import Invalid
from service.deps import Service
from service.known_sets import Operand
from service.resources import EmbeddingSet


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
