"""Losses: pure functions of unit embeddings and a scale. They see neither towers nor batches of data."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def info_nce(
    z_a: Float[Tensor, "batch dim"], z_b: Float[Tensor, "batch dim"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Compute symmetric InfoNCE, the mean over both directions, in nats (Radford et al. 2021, figure 3).

    Row i of both is one pair, all other rows are its negatives. The minimiser is scale * <z_a, z_b> =
    log p(a, b) / (p(a) p(b)) + const, which is what composition builds on.
    """
    logits = scale * z_a @ z_b.T  # (batch, batch)
    targets = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def floor(batch_size: int, counts: Int[np.ndarray, " value"]) -> float:
    """Compute the least loss that repeats allow: E log(1 + others in the batch with the same payload), in nats.

    `counts` says how often each distinct payload of one modality occurs in the data. Pairs that share a payload cannot
    be told apart, so no model is below it (Chen et al. 2024, section 3). Others ~ Binomial(batch_size - 1, share).
    """
    sizes, multiplicity = np.unique(counts, return_counts=True)
    total = float(counts.sum())
    others = np.arange(batch_size)
    # log n choose k, from the cumulative sum of log k
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, batch_size + 1)))])
    log_choose = log_factorial[batch_size - 1] - log_factorial[others] - log_factorial[batch_size - 1 - others]
    expected = 0.0
    for size, times in zip(sizes.tolist(), multiplicity.tolist(), strict=True):
        share = size / total
        if share == 1:
            return float(np.log(batch_size))
        log_probability = log_choose + others * np.log(share) + (batch_size - 1 - others) * np.log1p(-share)
        expected += times * share * float(np.exp(log_probability) @ np.log1p(others))
    return expected
