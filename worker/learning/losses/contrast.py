"""The contrastive losses: pure functions of vectors, a scale and a bias; and what pulls positives alone."""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from service.contract.losses import Critic
from worker.learning import critics
from worker.learning.losses import tiled

DENSE_SCORES: Final = 1 << 20  # up to here the matrix is small, and plain autograd as fast


def info_nce(
    critic: Critic, z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute symmetric InfoNCE, the mean over both directions, in nats (Radford et al. 2021, figure 3).

    Row i of both is one pair, all other rows are its negatives. The minimiser is scale * score = log p(a, b) /
    (p(a) p(b)) + const, which is what composition builds on.
    """
    a, b = critics.as_inner_products(critic, z_a, z_b)
    if len(a) * len(b) > DENSE_SCORES:
        largest = scale.detach() * critics.largest_score(critic, z_a, z_b)
        return tiled.symmetric_info_nce(scale * a, b, is_small=bool(largest <= tiled.SMALL))
    logits = scale * a @ b.T  # (batch, batch)
    targets = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def one_sided_info_nce(
    critic: Critic,
    z_a: Float[Tensor, "anchor dim"],
    z_b: Float[Tensor, "candidate dim"],
    scale: Float[Tensor, ""],
    *,
    offset: int = 0,
) -> Float[Tensor, ""]:
    """Compute one direction of InfoNCE: anchor i finds candidate i + offset among all candidates."""
    a, b = critics.as_inner_products(critic, z_a, z_b)
    if len(a) * len(b) > DENSE_SCORES:
        return tiled.one_sided_info_nce(scale * a, b, offset)
    return functional.cross_entropy(scale * a @ b.T, torch.arange(len(a), device=a.device) + offset)


def sigmoid(
    critic: Critic,
    z_a: Float[Tensor, "anchor dim"],
    z_b: Float[Tensor, "candidate dim"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    *,
    offset: int = 0,
) -> Float[Tensor, ""]:
    """Compute the sigmoid loss, in nats per anchor (Zhai et al. 2023, equation 1): yes at i + offset, else no.

    The minimiser is scale * score + bias = log p(a, b) / (p(a) p(b)) - log(negatives of an anchor).
    """
    a, b = critics.as_inner_products(critic, z_a, z_b)
    if len(a) * len(b) > DENSE_SCORES:
        return tiled.sigmoid_sum(scale * a, b, bias, offset)
    logits = scale * a @ b.T + bias  # (anchor, candidate)
    return (functional.softplus(logits, threshold=tiled.LINEAR_FROM).sum() - logits.diagonal(offset).sum()) / len(a)


def k_sample(
    critic: Critic,
    z_a: Float[Tensor, "batch dim"],
    z_b: Float[Tensor, "batch dim"],
    scale: Float[Tensor, ""],
    candidates: int,
) -> Float[Tensor, ""]:
    """Compute the K-sample risk, the sum of both directions, in nats (Oko et al. 2025).

    A batch is (K + 1) n pairs: the first n are the matched ones of direction a -> b, the next n those of b -> a. Of the
    rest every anchor has K - 1 of its own as negatives, so that they are independent of it and of each other.
    """
    num = len(z_a) // (candidates + 1)
    total = scale.new_zeros(())
    for at, (anchors, others) in enumerate(((z_a, z_b), (z_b, z_a))):
        z = anchors[at * num : (at + 1) * num]
        beside = torch.cat([others[at * num : (at + 1) * num], others[2 * num :]]).view(candidates, num, -1)
        logits = scale * critics.paired_scores(critic, z.expand_as(beside), beside)  # (candidate, anchor)
        total = total + (logits.logsumexp(0) - logits[0]).mean()
    return total


def square(z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Compute the mean squared distance of the pairs."""
    return (z_a - z_b).square().sum(1).mean()
