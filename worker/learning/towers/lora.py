"""Low-rank updates of the matrices of blocks (Hu et al. 2021): W x + (alpha / rank) B A x, of which only A and B learn.

B starts at zero, so a tower starts as the one that it came from. A checkpoint keeps the factors, because a run goes on
from them bit for bit; a model that is published or served has them merged into its matrices and costs what it always
did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from service.contract.towers import LoRA

MATRICES: Final = ("qkv", "out", "up", "down")
"""Of a block."""
_A: Final = ".lora_a"
_B: Final = ".lora_b"


@final
class Adapted(nn.Module):
    """A linear map that does not learn, and its low-rank update, which does."""

    def __init__(self, linear: nn.Linear, config: LoRA) -> None:
        """Take over the parameters of a linear map under their own names."""
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.factor = config.alpha / config.rank
        self.lora_a = nn.Parameter(torch.empty(config.rank, linear.in_features, device=linear.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, config.rank, device=linear.weight.device))
        nn.init.normal_(self.lora_a, std=linear.in_features**-0.5)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """Apply the map as it is now."""
        update = functional.linear(functional.linear(x, self.lora_a), self.lora_b)
        return functional.linear(x, self.weight, self.bias) + self.factor * update


def adapt(block: nn.Module, config: LoRA) -> None:
    """Give each matrix of a block a low-rank update, drawn from torch's generator."""
    for name in MATRICES:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        block.add_module(name, Adapted(linear, config))


def is_factor(name: str) -> bool:
    """Tell whether a weight, by its name, is half of an update."""
    return name.endswith((_A, _B))


def merged(weights: Mapping[str, Tensor], prefix: str, config: LoRA) -> dict[str, Tensor]:
    """Return a model's weights with the updates of one tower, named by its prefix, added to their matrices.

    What has no factors, because it was merged before, stays as it is.
    """
    plain = dict(weights)
    for name in weights:
        if name.startswith(prefix) and name.endswith(_A):
            matrix = name.removesuffix(_A)
            a, b = plain.pop(matrix + _A), plain.pop(matrix + _B)
            weight = plain[f"{matrix}.weight"]
            update = config.alpha / config.rank * (b.double() @ a.double())
            plain[f"{matrix}.weight"] = (weight + update).to(weight.dtype)
    return plain
