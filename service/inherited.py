"""Recipes as callers write them: a tower may be given as the one of a model that exists, whatever that is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, StrictBool, StrictInt, Tag, TypeAdapter, ValidationError

from service.contract.errors import Invalid, IsthmusError, NotFound
from service.contract.recipe import Recipe
from service.contract.towers import AnyTower, Augment, InitFrom, LoRA, PretrainedTower, Tower
from service.contract.word import ModalityName, Real, Word
from service.edge.problems import validate

Starts = Mapping[str, Mapping[str, Any]]
"""The bodies of models' manifests, by the name that a recipe gives."""


class InheritedTower(Word):
    """The tower of a model: its tokens and all of its shape are filled in as the job is submitted."""

    kind: Literal["inherited"]
    init_from: InitFrom
    locked: Annotated[
        StrictBool, Field(description="nothing of the tower learns, but for a new read-out; needs init_from")
    ] = False
    new_readout: Annotated[
        StrictBool, Field(description="draw the linear map into the shared space anew and learn it, even when locked")
    ] = False
    frozen_blocks: Annotated[
        StrictInt, Field(ge=0, le=1000, description="the embedding and the first blocks do not learn")
    ] = 0
    lora: Annotated[LoRA | None, Field(description="not for towers that were imported")] = None
    dropout: Annotated[Real | None, Field(ge=0, lt=1, description="null: the model's; not for imported towers")] = None
    augment: Augment | None = None

    @property
    def is_still(self) -> bool:
        """Whether nothing of the tower learns, so that its vectors stay what they are."""
        return self.locked and not self.new_readout


def _kind_of(value: Any) -> str | None:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value).get("kind", "transformer")
    return getattr(value, "kind", None)


class WantedRecipe(Recipe):
    """A recipe whose towers may be inherited."""

    towers: Annotated[  # pyright: ignore[reportIncompatibleVariableOverride] - frozen, so never written through Recipe
        dict[
            ModalityName,
            Annotated[
                Annotated[Tower, Tag("transformer")]
                | Annotated[PretrainedTower, Tag("pretrained")]
                | Annotated[InheritedTower, Tag("inherited")],
                Discriminator(_kind_of),
            ],
        ],
        Field(min_length=2, max_length=64),
    ]


_towers: TypeAdapter[Tower | PretrainedTower] = TypeAdapter(AnyTower)
_recipes: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def filled_in(wanted: WantedRecipe, starts: Starts) -> Recipe:
    """Return the recipe with every tower written out.

    Raises NotFound for a model that is not there, Invalid for one without that tower or whose tower does not take this.
    """
    document = wanted.model_dump(mode="json")
    for name, tower in wanted.towers.items():
        if isinstance(tower, InheritedTower):
            try:
                document["towers"][name] = _written_out(name, tower, starts, wanted.dimensions)
            except IsthmusError as error:
                raise error.at(f"recipe.towers.{name}") from None
    try:
        return validate(_recipes, document)
    except IsthmusError as error:
        raise error.at("recipe") from None


def _written_out(name: str, tower: InheritedTower, starts: Starts, dimensions: int) -> dict[str, Any]:
    body = starts.get(tower.init_from.model)
    if body is None:
        message = f"there is no model {tower.init_from.model}"
        raise NotFound(message, param="init_from.model", code="model_not_found")
    modality = tower.init_from.modality or name
    known = body["recipe"]["towers"]
    if modality not in known:
        message = f"the model has no modality {modality!r}; it has {', '.join(sorted(known))}"
        raise Invalid(message, param="init_from.modality")
    try:
        base = _towers.validate_python(known[modality])
    except ValidationError:
        raise Invalid("the model was made by another version of this service", param="init_from.model") from None
    changes = tower.model_dump(mode="json", include={"init_from", "locked", "new_readout", "frozen_blocks", "augment"})
    if isinstance(base, Tower):
        changes["lora"] = None if tower.lora is None else tower.lora.model_dump(mode="json")
        if tower.dropout is not None:
            changes["dropout"] = tower.dropout
    else:
        for field, value in (("lora", tower.lora), ("dropout", tower.dropout)):
            if value is not None:
                raise Invalid(f"an imported tower takes no {field}", param=field)
        changes["readout"] = base.readout or tower.new_readout or base.size != dimensions
    return base.model_dump(mode="json") | changes
