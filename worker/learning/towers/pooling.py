"""From the vectors of a sequence's tokens to one: a learned query looks at all of them.

It is the pooling head of SigLIP (Zhai et al. 2023) without what a constant query and a linear read-out behind it make
needless: no projection of the query, none of the result, and no perceptron.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional


@final
class AttentionPool(nn.Module):
    """Multi-head attention of one learned query over the tokens of each sequence."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(width))  # of zeros: training starts at the mean of the values
        self.key_value = nn.Linear(width, 2 * width)

    def forward(
        self, x: Float[Tensor, "sequence token width"], allowed: Bool[Tensor, "sequence 1 1 token"] | None
    ) -> Float[Tensor, "sequence width"]:
        """Pool each sequence; `allowed` is None if all tokens are real."""
        k, v = self.key_value(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = self.query.to(k.dtype).view(self.num_heads, 1, -1).expand(len(x), -1, -1, -1)
        pooled = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return pooled.flatten(1)  # (sequence, head, 1, width / head) -> (sequence, width)
