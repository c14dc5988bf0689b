"""What a model is made of, as `recipe.json` in its artifact says: the recipe that made it, or what was imported."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, cast

from pydantic import Field, StrictInt, model_validator

from service.contract.losses import Critic, InfoNCE, Loss
from service.contract.recipe import Recipe, check_dimensions
from service.contract.towers import PretrainedTower
from service.contract.word import ModalityName, Word


class ImportedPair(Word):
    """Two modalities that a checkpoint was trained with, and the loss that tells what its scores mean."""

    modalities: tuple[ModalityName, ModalityName]
    loss: Loss | None = None


class Imported(Word):
    """A model that was trained elsewhere: one tower, or two and the pair that joins them."""

    kind: Literal["imported"] = "imported"
    source: Annotated[str, Field(max_length=1024, description="what was imported, as the job named it")]
    architecture: Annotated[str, Field(max_length=200)]
    towers: Annotated[dict[ModalityName, PretrainedTower], Field(min_length=1, max_length=2)]
    pairs: Annotated[list[ImportedPair], Field(max_length=1)]
    dimensions: Annotated[StrictInt, Field(ge=1, le=16_384, description="of the shared space")]
    critic: Critic = "cosine"
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Field(description="auto: bf16 autocast on CUDA, fp32 elsewhere")
    ] = "fp32"

    @model_validator(mode="after")
    def _parts_fit(self) -> Imported:
        check_dimensions(self.towers, self.dimensions)
        if any(set(pair.modalities) != set(self.towers) for pair in self.pairs):
            msg = "a pair joins two towers"
            raise ValueError(msg)
        return self

    def loss_of(self, pair: ImportedPair) -> Loss:
        """Return the loss of the pair."""
        return pair.loss or InfoNCE()


Blueprint = Recipe | Imported


def read_blueprint(text: str | bytes) -> Blueprint:
    """Read `recipe.json`.

    Raises ValidationError if another version wrote it.
    """
    document = json.loads(text)
    is_imported = isinstance(document, dict) and cast("dict[str, Any]", document).get("kind") == "imported"
    return Imported.model_validate(document) if is_imported else Recipe.model_validate(document)
