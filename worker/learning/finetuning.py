"""What a tower starts from, what of it learns, and what of that a model keeps (`init_from`, `locked`, `lora`, ...).

A run reads the towers that it starts from once, before its first step. From then on its own checkpoints hold them
whole, and so does the model that it ends in: neither needs the other model again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, assert_never, final

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from service.contract.blueprint import Blueprint, read_blueprint
from service.contract.errors import Invalid, NotFound, Permanent, Transient
from service.contract.recipe import Compute, Recipe
from service.contract.towers import PretrainedTower, Tower, check_start, draws_readout
from service.contract.word import Word
from worker.learning.model import MultiTower, merged, prefix_of, read_tokenisers
from worker.learning.towers import lora
from worker.learning.towers.pretrained import Pretrained
from worker.learning.towers.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from worker.learning.towers import AnyModule
    from worker.runner import Context


READOUT: Final = "readout.weight"
"""The linear map into the shared space, by its name in a tower."""


class Origin(Word):
    """Where a tower comes from, for good: a manifest and each checkpoint of a run say it."""

    model: str
    digest: str
    modality: str
    data: dict[str, dict[str, Any]]
    """What that model learned from, as its manifest says."""


@final
@dataclass(frozen=True)
class Donor:
    """A tower to start from: its weights by their name in it, and the files of its tokeniser."""

    origin: Origin
    weights: dict[str, Tensor]
    tokeniser_files: dict[str, bytes]
    has_readout: bool
    """Whether its read-out comes along, if it has one."""


def read_donors(recipe: Recipe, ctx: Context) -> dict[str, Donor]:
    """Read what the towers of a recipe start from, by modality.

    Raises Permanent if a model is gone, is damaged, or its tower is not the one that the recipe describes; Transient if
    it goes at this moment.
    """
    return {name: _read(name, tower, recipe, ctx) for name, tower in recipe.towers.items() if tower.init_from}


def _read(name: str, tower: Tower | PretrainedTower, recipe: Recipe, ctx: Context) -> Donor:
    assert tower.init_from is not None
    ref, at = tower.init_from.model, f"recipe.towers.{name}"
    if ref not in ctx.inputs:
        raise Permanent(f"{at}.init_from.model: there is no model {ref} any more", code="model_not_found")
    given = ctx.inputs[ref]
    modality = tower.init_from.modality or name
    try:
        manifest = ctx.store.manifest(given["artifact"])
        folder = ctx.store.verified(given["artifact"])
    except (NotFound, FileNotFoundError) as error:
        # A checkpoint that its own run has pruned since. There may be a newer one; if not, the next claim says so.
        raise Transient(f"{at}.init_from.model: {ref} was removed before it was read", code="model_gone") from error
    if (folder / "model").is_dir():  # of a checkpoint
        folder /= "model"
    try:
        other = read_blueprint((folder / "recipe.json").read_bytes())
    except ValidationError as error:
        message = f"{at}.init_from.model: {ref} was made by another version, {manifest.code_version}"
        raise Permanent(message, code="start_differs") from error
    if modality not in other.towers:
        known = ", ".join(sorted(other.towers))
        raise Permanent(f"{at}.init_from.modality: {ref} has no modality {modality!r}; it has {known}")
    try:
        check_start(tower, recipe.dimensions, other.towers[modality], other.dimensions)
    except Invalid as error:
        raise Permanent(f"{at}: {error.message}", code=error.code) from error
    return Donor(
        origin=Origin(model=given["id"], digest=given["digest"], modality=modality, data=manifest.body.get("data", {})),
        weights=_weights_of(modality, other, folder / "model.safetensors"),
        tokeniser_files=read_tokenisers(folder).get(modality, {}),
        has_readout=not draws_readout(tower, recipe.dimensions, other.towers[modality], other.dimensions),
    )


def _weights_of(modality: str, recipe: Blueprint, file: Path) -> dict[str, Tensor]:
    prefix = prefix_of(modality)
    with safe_open(file, "pt") as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)}  # noqa: SIM118
    return {name.removeprefix(prefix): value for name, value in merged(found, recipe).items()}


def tokenisers_of(donors: Mapping[str, Donor]) -> dict[str, dict[str, bytes]]:
    """Return the files of the tokenisers that towers bring along, by modality."""
    return {name: donor.tokeniser_files for name, donor in donors.items() if donor.tokeniser_files}


def inherited(origins: Mapping[str, Origin]) -> dict[str, dict[str, Any]]:
    """Return the data sets that a model knows through what it started from: it learned from them too."""
    return {name: entry for origin in origins.values() for name, entry in origin.data.items()}


def build_learner(recipe: Recipe, vocab_sizes: Mapping[str, int]) -> MultiTower:
    """Build the model of a recipe as it learns: what does not is marked, and low-rank updates are in their places.

    Its first weights are those of `MultiTower`, whatever learns; what is added is drawn after them.
    """
    model = MultiTower(recipe, vocab_sizes)
    for name, config in sorted(recipe.towers.items()):
        tower = model.towers[name]
        tower.recomputes = (recipe.compute or Compute()).activation_checkpointing
        if config.locked:
            _lock(tower, new_readout=config.new_readout)
            continue
        match tower:
            case Transformer():
                assert isinstance(config, Tower)
                _hold_still(tower, config)
                if config.lora is not None:
                    for block in tower.blocks[config.frozen_blocks :]:
                        lora.adapt(block, config.lora)
            case Pretrained():
                if config.frozen_blocks:
                    tower.hold_still(config.frozen_blocks)
            case _:
                assert_never(tower)
    return model


def _lock(tower: AnyModule, *, new_readout: bool) -> None:
    tower.requires_grad_(requires_grad=False)
    tower.is_locked = True
    tower.eval()
    if new_readout and tower.readout is not None:
        tower.readout.requires_grad_(requires_grad=True)


def _hold_still(tower: Transformer, config: Tower) -> None:
    """Mark what does not learn; beside low-rank updates only the read-out does."""
    if not (config.lora or config.frozen_blocks):
        return
    tower.requires_grad_(requires_grad=False)
    learning: list[nn.Module] = [tower.readout]
    if config.lora is None:
        learning += [*tower.blocks[config.frozen_blocks :], tower.norm, *([tower.pool] if tower.pool else [])]
    for module in learning:
        module.requires_grad_(requires_grad=True)


@torch.no_grad()
def take_over(model: MultiTower, donors: Mapping[str, Donor], ctx: Context) -> None:
    """Give towers the weights that they start from; a read-out into a space of other dimensions stays as drawn.

    Raises Permanent if the weights are not those of such a tower.
    """
    for name, donor in donors.items():
        has_readout = donor.has_readout
        own = {
            key: value
            for key, value in model.towers[name].state_dict(keep_vars=True).items()
            if not lora.is_factor(key)
        }
        given = {key: value for key, value in donor.weights.items() if has_readout or key != READOUT}
        expected = {key: value.shape for key, value in own.items() if has_readout or key != READOUT}
        if {key: value.shape for key, value in given.items()} != expected:
            message = f"recipe.towers.{name}.init_from.model: its weights are those of another version"
            raise Permanent(message, code="start_differs")
        for key, value in given.items():
            own[key].copy_(value)
        about = donor.origin.model_dump(include={"model", "digest", "modality"})
        readout = "drawn anew" if not has_readout else "taken over" if READOUT in given else "none"
        ctx.event("started_from", {"tower": name, **about, "readout": readout})


def published(model: MultiTower, recipe: Recipe, vocab_sizes: Mapping[str, int]) -> MultiTower:
    """Return the model as it is served: low-rank updates merged; the model itself if it has none."""
    if not any(isinstance(tower, Tower) and tower.lora for tower in recipe.towers.values()):
        return model
    with torch.device("meta"):
        plain = MultiTower(recipe, vocab_sizes)
    plain.load_state_dict(merged(model.state_dict(), recipe), assign=True)
    return plain.eval().requires_grad_(requires_grad=False)
