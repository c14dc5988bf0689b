"""Rotary positions (Su et al. 2021, RoFormer): queries and keys are turned by an angle that grows with their place.

A turned query meets a turned key as if only the distance between their places were known, so a score depends on how far
apart two tokens are and not on where. Value i of a head is paired with value i + half, one of the two layouts in use;
they differ by an order of the values that no learned matrix can tell.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

BASE: Final = 10_000.0
"""The slowest pair turns once in about 2 pi * BASE places."""

Turn = tuple[Float[Tensor, "token half"], Float[Tensor, "token half"]]
"""Cosine and sine of the angle of every pair of values, by place."""


def turn_of(places: Float[Tensor, " token"], head_width: int) -> Turn:
    """Return the turn of each place; pair i of a head turns by BASE ** (-2 i / head_width) a place."""
    exponents = torch.arange(0, head_width, 2, device=places.device, dtype=places.dtype) / head_width
    angles = places[:, None] * BASE**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "*batch token head_width"], turn: Turn) -> Float[Tensor, "*batch token head_width"]:
    """Turn queries or keys by their place, in the precision of the angles."""
    cos, sin = turn
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1).to(x.dtype)
