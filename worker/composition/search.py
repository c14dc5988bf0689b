"""The best targets of each source, out of any number that come in blocks: sources x targets never exist at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from worker.composition.chains import Ending

LOG_PRIOR_FLOOR: Final = -1e4  # a prior of zero ranks last, and stays a number


@final
@dataclass(frozen=True)
class Best:
    """The best targets of each source, best first; of equal ones the earlier.

    `log_normaliser`: log of the sum over all targets of prior * e^score.
    """

    index: Int64[Tensor, "source best"]
    rank: Float[Tensor, "source best"]  # what they were ranked by: the score and the prior
    score: Float[Tensor, "source best"]
    log_normaliser: Float[Tensor, " source"]


@final
class Ranking:
    """Keeps the best targets of each source while blocks of scores come by, in any order."""

    def __init__(self, num_sources: int, top_k: int, *, device: torch.device | None = None) -> None:
        if top_k < 1:
            raise ValueError("top_k is at least 1")
        self._top_k = top_k
        self._rank = torch.empty(num_sources, 0, dtype=torch.float64, device=device)
        self._score = self._rank
        self._index = torch.empty(num_sources, 0, dtype=torch.int64, device=device)
        self._log_sum = torch.full((num_sources,), -math.inf, dtype=torch.float64, device=device)

    def add(
        self,
        first: int,
        score: Float[Tensor, "source target"],
        log_prior: Float[Tensor, " target"] | None = None,
    ) -> None:
        """Take the scores of the targets from number `first` on; without a prior all targets weigh 1."""
        score = score.double()
        self._log_sum = torch.logaddexp(self._log_sum, (score if log_prior is None else score + log_prior).logsumexp(1))
        rank = score if log_prior is None else score + log_prior.clamp(min=LOG_PRIOR_FLOOR)
        # Only what can be among the best of some row is sorted; equal ones at the edge all stay until then.
        least = rank.topk(min(self._top_k, rank.shape[1]), dim=1).values[:, -1:]
        if self._rank.shape[1] == self._top_k:
            least = torch.maximum(least, self._rank[:, -1:])
        columns = (rank >= least).any(0).nonzero()[:, 0]
        if not len(columns):
            return
        index = (first + columns).expand(len(rank), -1)
        rank, score = rank[:, columns], score[:, columns]
        index, rank, score = (
            torch.cat(parts, 1) for parts in ((self._index, index), (self._rank, rank), (self._score, score))
        )
        by_index = index.argsort(1)
        by_rank = rank.gather(1, by_index).sort(dim=1, descending=True, stable=True).indices[:, : self._top_k]
        order = by_index.gather(1, by_rank)
        self._index, self._rank, self._score = (each.gather(1, order) for each in (index, rank, score))

    def best(self) -> Best:
        """Return what was best so far."""
        return Best(self._index, self._rank, self._score, self._log_sum)


def top_k(
    ending: Ending,
    blocks: Iterable[Float[Tensor, "target d2"]],
    k: int,
    *,
    log_prior: Float[Tensor, " all"] | None = None,
) -> Best:
    """Rank all targets of an iterator of blocks, prepared vectors on the bridge's device, for each source.

    Blocks of a few thousand are best; each is asked for when the one before it is done with. Raises ValueError for a
    prior of another length than there are targets, or if there are none.
    """
    ranking, first = Ranking(ending.num_sources, k, device=None), 0
    for z_target in blocks:
        if not first:
            ranking = Ranking(ending.num_sources, k, device=z_target.device)
        end = first + len(z_target)
        if log_prior is not None and end > len(log_prior):
            raise ValueError(f"{len(log_prior)} priors for {end} targets and more")
        ranking.add(first, ending.log_ratios(z_target), None if log_prior is None else log_prior[first:end])
        first = end
    if not first or (log_prior is not None and first != len(log_prior)):
        raise ValueError(f"{first} targets" if log_prior is None else f"{len(log_prior)} priors for {first} targets")
    return ranking.best()
