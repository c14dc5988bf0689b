"""The model: tokens of each modality to vectors of one space; and its life as a directory (safetensors, never pickle).

    recipe.json             verbatim
    model.safetensors       weights, the towers' fixed first steps included; low-rank updates are merged into their
                            matrices, but in a checkpoint, which holds their factors
    tokenizers/<m>.json     of each modality that is text
    bank.safetensors        the bridge bank: `a+b/m/vectors` (bridge, dim); if items are kept also `a+b/m/values`,
                            `a+b/m/lengths` and, where an item is several sequences, `a+b/m/owners`

A published model has `manifest.json` beside these; a checkpoint holds them in `model/`, one level below its manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, assert_never, final

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from service.contract.blueprint import Blueprint, Imported, read_blueprint
from service.contract.losses import Critic, InfoNCE, KSample, Loss, Scaled, Sigmoid, Square
from service.contract.recipe import Recipe, pair_name
from service.contract.tokens import tokenise
from service.contract.tokens.text import FILE as TOKENISER_FILE
from service.contract.tokens.tokenise import Tokeniser
from service.contract.towers import Tower
from worker.learning import critics, towers
from worker.learning.device import Precision
from worker.learning.ragged import Ragged
from worker.learning.tensors import save_tensors
from worker.learning.towers import lora


@final
@dataclass(frozen=True)
class Bank:
    """Bridge items of one trained pair: row k of both modalities is the same sample. `items` is empty if not kept."""

    vectors: dict[str, Float[Tensor, "bridge dim"]]
    items: dict[str, Ragged] = field(default_factory=dict[str, Ragged])


@final
class MultiTower(nn.Module):
    """One tower per modality in a shared space, and per pair of modalities a learned logit scale.

    Pairs that are trained with the sigmoid loss have a learned bias too; the others have none.
    """

    def __init__(self, recipe: Blueprint, vocab_sizes: Mapping[str, int]) -> None:
        """Build the towers of a recipe; `vocab_sizes` gives the alphabet of each modality whose tokens are ids."""
        super().__init__()
        self.dimensions = recipe.dimensions
        self.critic: Critic = recipe.critic
        self.precision: Precision = recipe.precision
        self.towers = {
            name: towers.build(tower, vocab_sizes.get(name), recipe.dimensions)
            for name, tower in sorted(recipe.towers.items())
        }
        for name, tower in self.towers.items():
            # Not a ModuleDict: it refuses the names of its own methods, and a modality may be called `type`.
            self.add_module(prefix_of(name).removesuffix("."), tower)
        losses = losses_of(recipe)
        self.log_scales = nn.ParameterDict(
            {
                name: nn.Parameter(
                    torch.tensor(math.log(_start_scale(loss, recipe.dimensions))),
                    requires_grad=isinstance(loss, Scaled) and loss.learn_scale,
                )
                for name, loss in sorted(losses.items())
            }
        )
        self.biases = nn.ParameterDict(
            {
                name: nn.Parameter(torch.tensor(loss.init_bias))
                for name, loss in sorted(losses.items())
                if isinstance(loss, Sigmoid)
            }
        )
        self._max_scales = {name: loss.max_scale for name, loss in losses.items() if isinstance(loss, Scaled)}

    def encode(self, modality: str, batch: Ragged) -> Float[Tensor, "item dim"]:
        """Encode items to vectors, float32: unit vectors if the critic is the cosine, else as the tower gives them.

        The sequences of one item are averaged as such vectors.
        """
        z = critics.prepare(self.critic, self.towers[modality](batch).float())
        if batch.owners is None:
            return z
        owners = batch.owners.to(z.device)
        sums = z.new_zeros(batch.num_items, z.shape[1]).index_add(0, owners, z)
        if self.critic == "cosine":
            return critics.prepare(self.critic, sums)
        return sums / owners.bincount(minlength=batch.num_items)[:, None]

    def scale(self, first: str, second: str) -> Float[Tensor, ""]:
        """Return the logit scale of a trained pair, in either order."""
        return self.log_scales[pair_name(first, second)].exp()

    def bias(self, first: str, second: str) -> Float[Tensor, ""] | None:
        """Return the bias of a pair that was trained with the sigmoid loss, in either order; None for other pairs."""
        return self.biases.get(pair_name(first, second), None)

    def is_trained(self, first: str, second: str) -> bool:
        """Tell whether this pair of modalities was trained together."""
        return pair_name(first, second) in self.log_scales

    def gives_ratios(self, first: str, second: str) -> bool:
        """Tell whether scale * score of a trained pair is a log-ratio but for an offset: the square loss gives none."""
        return pair_name(first, second) in self._max_scales

    @torch.no_grad()
    def clamp_scales(self) -> None:
        """Keep every scale at or below the largest that its loss allows."""
        for name, largest in self._max_scales.items():
            self.log_scales[name].clamp_(max=math.log(largest))


def losses_of(recipe: Blueprint) -> dict[str, Loss]:
    """Return the loss of each pair of modalities, by its name."""
    match recipe:
        case Imported():
            return {pair_name(*pair.modalities): recipe.loss_of(pair) for pair in recipe.pairs}
        case Recipe():
            return {pair_name(*pair.modalities): recipe.loss_of(pair) for pair in recipe.pairs}
        case _:
            assert_never(recipe)


def _start_scale(loss: Loss, dimensions: int) -> float:
    match loss:
        case Square():
            return 1.0  # it knows no scale
        case InfoNCE() | KSample() | Sigmoid():
            by_loss = (
                (10.0 if isinstance(loss, Sigmoid) else 14.285714) if loss.critic == "cosine" else dimensions**-0.5
            )
            return min(by_loss if loss.init_scale is None else loss.init_scale, loss.max_scale)
        case _:
            assert_never(loss)


@final
@dataclass(frozen=True)
class Loaded:
    """A model as read from a directory: in evaluation mode, on its device, with its tokenisers and banks."""

    model: MultiTower
    recipe: Blueprint
    body: dict[str, Any]
    tokenisers: dict[str, Tokeniser]
    banks: dict[str, Bank]
    num_bytes: int


def build_tokenisers(recipe: Blueprint, files: Mapping[str, Mapping[str, bytes]]) -> dict[str, Tokeniser]:
    """Build the tokeniser of every modality; `files` holds those of the text modalities."""
    return {name: tokenise.build(tower.tokens, files.get(name, {})) for name, tower in recipe.towers.items()}


def read_tokenisers(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the tokeniser files of a model's folder, by modality."""
    return {path.stem: {TOKENISER_FILE: path.read_bytes()} for path in (folder / "tokenizers").glob("*.json")}


def vocab_sizes(recipe: Blueprint, tokenisers: Mapping[str, Tokeniser]) -> dict[str, int]:
    """Return the size of the alphabet of each modality whose tokens are ids."""
    sizes = {name: tokenisers[name].vocab_size for name in recipe.towers}
    return {name: size for name, size in sizes.items() if size is not None}


def prefix_of(modality: str) -> str:
    """Return what the names of a tower's weights begin with."""
    return f"tower_{modality}."


def merged(weights: Mapping[str, Tensor], recipe: Blueprint) -> dict[str, Tensor]:
    """Return a model's weights as they are served: with every low-rank update added to its matrix."""
    found = dict(weights)
    for name, tower in recipe.towers.items():
        if isinstance(tower, Tower) and tower.lora is not None:
            found = lora.merged(found, prefix_of(name), tower.lora)
    return found


def save_model(
    model: MultiTower,
    folder: Path,
    *,
    recipe: Blueprint,
    tokeniser_files: Mapping[str, Mapping[str, bytes]],
    banks: Mapping[str, Bank],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the model's files into a folder; return the body for its manifest, `extra` included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1), encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(weights, folder / "model.safetensors")
    for modality, files in tokeniser_files.items():
        (folder / "tokenizers").mkdir(exist_ok=True)
        (folder / "tokenizers" / f"{modality}.json").write_bytes(files[TOKENISER_FILE])
    if banks:
        save_tensors(_flatten(banks), folder / "bank.safetensors")
    return {
        "recipe": recipe.model_dump(mode="json"),
        "modalities": {name: tower.tokens.model_dump(mode="json") for name, tower in recipe.towers.items()},
        "dimensions": recipe.dimensions,
        "logit_scales": {name: float(log_scale.detach().exp()) for name, log_scale in model.log_scales.items()},
        "logit_biases": {name: float(bias.detach()) for name, bias in model.biases.items()},
        "critic": model.critic,
        "pairs": [name.split("+") for name in model.log_scales],
        "banks": {
            name: {"size": len(next(iter(bank.vectors.values()))), "items": bool(bank.items)}
            for name, bank in banks.items()
        },
        "torch": torch.__version__,
        **extra,
    }


def load_model(folder: Path, device: str | torch.device) -> Loaded:
    """Load a model from the directory of a published artifact or a checkpoint."""
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_text(encoding="utf-8"))["body"] if manifest.exists() else {}
    if (folder / "model").is_dir():
        folder = folder / "model"
    recipe = read_blueprint((folder / "recipe.json").read_bytes())
    tokenisers = build_tokenisers(recipe, read_tokenisers(folder))
    model = MultiTower(recipe, vocab_sizes(recipe, tokenisers))
    model.load_state_dict(merged(load_file(folder / "model.safetensors"), recipe))
    model.to(device).eval().requires_grad_(requires_grad=False)
    bank_file = folder / "bank.safetensors"
    flat = load_file(bank_file, device=str(device)) if bank_file.exists() else {}
    return Loaded(
        model=model,
        recipe=recipe,
        body=body,
        tokenisers=tokenisers,
        banks=_unflatten(flat),
        num_bytes=sum(tensor.nbytes for tensor in (*model.state_dict().values(), *flat.values())),
    )


def _flatten(banks: Mapping[str, Bank]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for pair, bank in banks.items():
        for modality, vectors in bank.vectors.items():
            flat[f"{pair}/{modality}/vectors"] = vectors.detach().cpu().contiguous()
        for modality, items in bank.items.items():
            values = items.values.cpu()
            flat[f"{pair}/{modality}/values"] = (values if values.ndim == 2 else values.int()).contiguous()
            flat[f"{pair}/{modality}/lengths"] = items.lengths.int()
            if items.owners is not None:
                flat[f"{pair}/{modality}/owners"] = items.owners.int()
    return flat


def _unflatten(flat: Mapping[str, Tensor]) -> dict[str, Bank]:
    banks: dict[str, Bank] = {}
    for name, vectors in flat.items():
        pair, modality, what = name.split("/")
        if what != "vectors":
            continue
        bank = banks.setdefault(pair, Bank(vectors={}))
        bank.vectors[modality] = vectors
        if (values := flat.get(f"{pair}/{modality}/values")) is not None:
            owners = flat.get(f"{pair}/{modality}/owners")
            bank.items[modality] = Ragged(
                values=values if values.ndim == 2 else values.long(),
                lengths=flat[f"{pair}/{modality}/lengths"].cpu().long(),
                owners=None if owners is None else owners.cpu().long(),
            )
    return banks
