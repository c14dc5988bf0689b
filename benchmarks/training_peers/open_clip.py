"""open_clip's towers and loss, trained as its own script does: AdamW, clipping, a clamp of the scale.

Its package wants torchvision and timm, of which these parts use one class by name; they are loaded without the rest.
Both towers look in both directions and the data lie in memory as it takes them: normalised pictures, padded ids.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training_peers.task import Ready, make_ready, take_turns, tower_of
from service.contract.modality import ImageTokens

PACKAGE: Final = "open_clip"
MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
DEVIATION: Final = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own."""


def is_installed() -> bool:
    """Tell whether the package is there."""
    return PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None


def load(part: str) -> Any:
    """Load one module of the package without running the package's own first lines."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
            sys.modules[name] = ModuleType(name)
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = nn.Identity  # pyright: ignore[reportAttributeAccessIssue]
    if PACKAGE not in sys.modules:
        found = importlib.util.find_spec(PACKAGE)
        assert found is not None
        package = ModuleType(PACKAGE)
        package.__path__ = list(found.submodule_search_locations or [])
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{part}")


@final
class Clip(nn.Module):
    """Its two towers at the sizes of the recipe."""

    def __init__(self, ready: Ready) -> None:
        super().__init__()
        parts = load("transformer")
        image, text = (tower_of(ready.recipe, name) for name in ("image", "text"))
        assert image.tokens.kind == "image"
        self.visual: nn.Module = parts.VisionTransformer(
            image_size=image.tokens.size,
            patch_size=image.tokens.patch,
            width=image.width,
            layers=image.depth,
            heads=image.heads,
            mlp_ratio=image.mlp_ratio,
            output_dim=ready.recipe.dimensions,
        )
        self.text: nn.Module = parts.TextTransformer(
            context_length=text.tokens.max_length,
            vocab_size=ready.vocab,
            width=text.width,
            layers=text.depth,
            heads=text.heads,
            mlp_ratio=text.mlp_ratio,
            output_dim=ready.recipe.dimensions,
            no_causal_mask=True,
            pool_type="last",
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode."""
        z_a, z_b = (functional.normalize(z, dim=-1) for z in (self.visual(images), self.text(ids)))
        return z_a, z_b, self.logit_scale.exp()


def pictures(patches: Tensor, tokens: ImageTokens) -> Tensor:
    """Put patches together to (picture, channel, height, width), in CLIP's units."""
    side = tokens.size // tokens.patch
    cut = patches.view(-1, side, side, tokens.patch, tokens.patch, tokens.channels)
    whole = cut.permute(0, 5, 1, 3, 2, 4).reshape(-1, tokens.channels, tokens.size, tokens.size)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return (whole / 255 - mean) / deviation


def losses(ready: Ready) -> Iterator[float]:
    """Train for ever; yield the loss of each step."""
    config, tokens = ready.optimiser, tower_of(ready.recipe, "image").tokens
    assert tokens.kind == "image"
    images, model, loss_of = pictures(ready.images, tokens), Clip(ready), load("loss").ClipLoss()
    named = list(model.named_parameters())
    gains = [value for name, value in named if value.ndim < 2 or "ln" in name or "bias" in name or "scale" in name]
    known = {id(value) for value in gains}
    rest = [value for _, value in named if id(value) not in known]
    groups = [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": config.weight_decay}]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    step = epoch = 0
    while True:
        for chosen in ready.epoch(epoch):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
            optimiser.zero_grad()
            loss = loss_of(*model(images[chosen], ready.ids[chosen]))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            yield loss.item()
            step += 1
        epoch += 1


if __name__ == "__main__":
    data = make_ready(Path(sys.argv[1]))
    take_turns(data, losses(data))
