"""The least that training the same model takes: plain PyTorch, written by hand for this one task.

All data lie in memory as tensors, the matrix of logits is whole, and nothing is reported, checked or saved. Towers,
batches and their order are ours, so the losses are too, but for rounding. None of our own code runs in a step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.training_peers.task import Ready, make_ready, take_turns, tower_of
from service.contract.towers import Tower as TowerConfig


@final
class Block(nn.Module):
    """Pre-norm attention and perceptron."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm_mlp(x))))


@final
class Tower(nn.Module):
    """Pixels with a class token, or ids averaged; to unit vectors."""

    def __init__(self, config: TowerConfig, vocab: int | None, dimensions: int) -> None:
        super().__init__()
        tokens, width = config.tokens, config.width
        self.is_image = tokens.kind == "image"
        if tokens.kind == "image":
            self.mean = nn.Buffer(torch.empty(tokens.dim))
            self.deviation = nn.Buffer(torch.empty(tokens.dim))
            self.projection = nn.Linear(tokens.dim, width)
            self.cls = nn.Parameter(torch.empty(width))
        else:
            assert vocab is not None
            self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.empty(tokens.max_length, width))
        hidden = round(config.mlp_ratio * width)
        self.blocks = nn.Sequential(*(Block(width, config.heads, hidden) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, dimensions, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode."""
        if self.is_image:
            x = self.projection((tokens.float() - self.mean) / self.deviation) + self.positions
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
            x = self.norm(self.blocks(x))[:, 0]
        else:
            x = self.norm(self.blocks(self.embedding(tokens) + self.positions)).mean(1)
        return functional.normalize(self.readout(x), dim=-1)


@final
class Bare(nn.Module):
    """Both towers, the scale, and one step after another."""

    def __init__(self, ready: Ready) -> None:
        super().__init__()
        recipe = ready.recipe
        self.tower_image = Tower(tower_of(recipe, "image"), None, recipe.dimensions)
        self.tower_text = Tower(tower_of(recipe, "text"), ready.vocab, recipe.dimensions)
        self.log_scale = nn.Parameter(torch.zeros(()))
        own = {name: value for name, value in ready.weights.items() if name != "log_scales.image+text"}
        self.load_state_dict(own | {"log_scale": ready.weights["log_scales.image+text"]})

    def loss(self, images: Tensor, ids: Tensor) -> Tensor:
        """Compute symmetric InfoNCE, the matrix in full."""
        logits = self.log_scale.exp() * self.tower_image(images) @ self.tower_text(ids).T
        targets = torch.arange(len(logits))
        return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def losses(ready: Ready) -> Iterator[float]:
    """Train for ever; yield the loss of each step."""
    config = ready.optimiser
    num_steps, warm_up = ready.budget.steps, min(config.warmup_steps, ready.budget.steps)
    model = Bare(ready)
    named = list(model.named_parameters())
    decayed = [value for name, value in named if value.ndim >= 2 and not name.endswith("positions")]
    plain = [value for name, value in named if value.ndim < 2 or name.endswith("positions")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    step = epoch = 0
    while True:
        for chosen in ready.epoch(epoch):
            if step < warm_up:
                factor = (step + 1) / warm_up
            else:
                factor = (1 + math.cos(math.pi * (step - warm_up) / (num_steps - warm_up))) / 2
            for group in optimiser.param_groups:
                group["lr"] = factor * config.learning_rate
            loss = model.loss(ready.images[chosen], ready.ids[chosen])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimiser.step()
            with torch.no_grad():
                model.log_scale.clamp_(max=math.log(100))
            yield loss.item()
            step += 1
        epoch += 1


if __name__ == "__main__":
    data = make_ready(Path(sys.argv[1]))
    take_turns(data, losses(data))
