"""Critics: how two vectors of a space are compared. Every comparison goes through here: losses, retrieval, composition.

The logit of a pair is scale * score, with the scale of its two modalities; `scores` themselves know no scale.
"""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from service.contract.losses import Critic


def prepare(critic: Critic, z: Float[Tensor, "row dim"]) -> Float[Tensor, "row dim"]:
    """Bring vectors to the form that the critic compares: unit length for the cosine, as they are otherwise."""
    match critic:
        case "cosine":
            return functional.normalize(z, dim=-1)
        case "dot" | "squared_distance":
            return z
        case _:
            assert_never(critic)


def scores(
    critic: Critic, z_a: Float[Tensor, "row dim"], z_b: Float[Tensor, "column dim"]
) -> Float[Tensor, "row column"]:
    """Compare all vectors of one side with all of the other; those of the cosine are unit vectors already."""
    inner_a, inner_b = as_inner_products(critic, z_a, z_b)
    return inner_a @ inner_b.T


def paired_scores(
    critic: Critic, z_a: Float[Tensor, "*batch dim"], z_b: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch"]:
    """Compare each vector with the one in its place on the other side."""
    match critic:
        case "cosine" | "dot":
            return (z_a * z_b).sum(-1)
        case "squared_distance":
            return -(z_a - z_b).square().sum(-1) / 2
        case _:
            assert_never(critic)


def largest_score(critic: Critic, z_a: Float[Tensor, "row dim"], z_b: Float[Tensor, "column dim"]) -> Float[Tensor, ""]:
    """Return what no score of the two sides exceeds, whatever its sign, from the lengths of the vectors alone."""
    length_a, length_b = (z.detach().norm(dim=1).amax() for z in (z_a, z_b))
    match critic:
        case "cosine" | "dot":
            return length_a * length_b
        case "squared_distance":
            return (length_a + length_b).square() / 2
        case _:
            assert_never(critic)


def as_inner_products(
    critic: Critic, z_a: Float[Tensor, "row dim"], z_b: Float[Tensor, "column dim"]
) -> tuple[Float[Tensor, "row inner"], Float[Tensor, "column inner"]]:
    """Return vectors whose inner products are the scores.

    -1/2 |a - b|^2 = <(a, -|a|^2 / 2, 1), (b, 1, -|b|^2 / 2)>, so that one matrix product serves every critic.
    """
    match critic:
        case "cosine" | "dot":
            return z_a, z_b
        case "squared_distance":
            half_a, half_b = (z.square().sum(1, keepdim=True) / 2 for z in (z_a, z_b))
            return torch.cat([z_a, -half_a, torch.ones_like(half_a)], 1), torch.cat(
                [z_b, torch.ones_like(half_b), -half_b], 1
            )
        case _:
            assert_never(critic)
