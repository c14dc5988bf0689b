"""The least that a contrastive loss can be on data that repeat themselves, in nats; no model is below it.

Samples of one class, such as a caption's, cannot be told apart. `shares` are the classes' shares of the data, and a
batch is drawn from them independently.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def shares(counts: Int[np.ndarray, " value"]) -> tuple[Float[np.ndarray, " size"], Float[np.ndarray, " size"]]:
    """Return the distinct shares of values that occur so often, and how much of the data the values of each make up."""
    sizes, multiplicity = np.unique(counts, return_counts=True)
    total = counts.sum()
    return sizes / total, sizes * multiplicity / total


def softmax(num_others: int, counts: Int[np.ndarray, " value"]) -> float:
    """Compute E log(1 + others of the anchor's class) where `num_others` stand beside the positive.

    Others ~ Binomial(num_others, share) (Chen et al. 2024, section 3).
    """
    others = np.arange(num_others + 1)
    # log n choose k, from the cumulative sum of log k
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_others + 1)))])
    log_choose = log_factorial[num_others] - log_factorial - log_factorial[::-1]
    expected = 0.0
    for share, weight in zip(*shares(counts), strict=True):
        if share == 1:
            return float(np.log1p(num_others))
        log_probability = log_choose + others * np.log(share) + (num_others - others) * np.log1p(-share)
        expected += weight * float(np.exp(log_probability) @ np.log1p(others))
    return float(expected)


def sigmoid(num_others: int, counts: Int[np.ndarray, " value"]) -> float:
    """Compute the expected loss of an anchor under the best logit for each class.

    An anchor of share p meets one yes and k = num_others p noes of its class, all with one logit l; the noes of other
    classes cost nothing. softplus(-l) + k softplus(l) is least at l = -log k: (1 + k) log(1 + k) - k log k.
    """
    share, weight = shares(counts)
    noes = num_others * share
    return float(weight @ ((1 + noes) * np.log1p(noes) - noes * np.log(noes)))
