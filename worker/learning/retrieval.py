"""Retrieval metrics, exact under ties: a score that knows nothing gets the figure of chance and not a lucky one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from service.contract.losses import Critic
from worker.learning import critics

Scorer = Callable[[slice], Float[Tensor, "query target"]]
"""Scores a block of the queries against all targets."""

QUERIES_AT_ONCE: Final = 1024
SCORES_AT_ONCE: Final = 1 << 23


def hits_at_k(
    scores: Float[Tensor, "query target"], relevant: Bool[Tensor, "query target"], k: int
) -> tuple[Float[Tensor, " query"], Float[Tensor, " query"]]:
    """Return, per query, the probability that the top k hold a relevant target, and the expected share that is.

    Targets with equal scores are taken to be in random order; the expectation over that order is exact
    (hypergeometric). `k` beyond the number of targets means all of them.
    """
    k = min(k, scores.shape[1])
    boundary = scores.topk(k, dim=1).values[:, -1:]  # (query, 1)
    above, tied = scores > boundary, scores == boundary
    num_above_relevant = (above & relevant).sum(1).double()
    num_tied, num_tied_relevant = tied.sum(1).double(), (tied & relevant).sum(1).double()
    slots = k - above.sum(1).double()
    # P(no relevant one among the slots) = C(tied - relevant, slots) / C(tied, slots)
    others = num_tied - num_tied_relevant
    log_miss = (
        torch.lgamma(others + 1)
        - torch.lgamma((others - slots).clamp(min=0) + 1)
        - torch.lgamma(num_tied + 1)
        + torch.lgamma(num_tied - slots + 1)
    )
    miss = torch.where(others >= slots, log_miss.exp(), 0.0)
    hit = torch.where(num_above_relevant > 0, 1.0, 1.0 - miss)
    precision = (num_above_relevant + slots * num_tied_relevant / num_tied) / k
    return hit, precision


def hits_at_ks(
    score: Scorer,
    query_classes: Int64[Tensor, " query"],
    target_classes: Int64[Tensor, " target"],
    ks: Sequence[int],
) -> tuple[dict[int, Float[Tensor, " query"]], dict[int, Float[Tensor, " query"]]]:
    """Return `hits_at_k` of every query by k, a target being relevant if it has the query's class.

    Works on a block of the queries at a time, smaller where there are many targets.
    """
    at_once = max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // len(target_classes)))
    hits: dict[int, list[Tensor]] = {k: [] for k in ks}
    precisions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for start in range(0, len(query_classes), at_once):
        block = slice(start, start + at_once)
        scores = score(block)
        relevant = query_classes[block, None] == target_classes
        for k in ks:
            hit, precision = hits_at_k(scores, relevant, k)
            hits[k].append(hit)
            precisions[k].append(precision)
    return {k: torch.cat(hits[k]) for k in ks}, {k: torch.cat(precisions[k]) for k in ks}


def at_ks(
    score: Scorer,
    query_classes: Int64[Tensor, " query"],
    target_classes: Int64[Tensor, " target"],
    ks: Sequence[int],
) -> tuple[dict[int, float], dict[int, float]]:
    """Return recall@k and precision@k: the means over the queries."""
    hits, precisions = hits_at_ks(score, query_classes, target_classes, ks)
    num_queries = len(query_classes)
    return (
        {k: float(each.sum()) / num_queries for k, each in hits.items()},
        {k: float(each.sum()) / num_queries for k, each in precisions.items()},
    )


def by_critic(critic: Critic, z_query: Float[Tensor, "query dim"], z_target: Float[Tensor, "target dim"]) -> Scorer:
    """Score as the model compares its vectors."""
    return lambda block: critics.scores(critic, z_query[block], z_target)


def by_nothing(num_queries: int, num_targets: int) -> Scorer:
    """Score everything alike: what is left is chance."""
    return lambda block: torch.zeros(len(range(num_queries)[block]), num_targets)


def classes(*groups: Sequence[bytes] | Sequence[str]) -> list[Int64[Tensor, " item"]]:
    """Give the values of several lists numbers: the same for the same value."""
    numbers: dict[bytes | str, int] = {}
    return [torch.tensor([numbers.setdefault(value, len(numbers)) for value in group]) for group in groups]
