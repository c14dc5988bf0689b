"""Which estimator answers a composition that leaves it open, and why, in words.

Comparing vectors has no error of a draw, and means something only for one encoder of the bridge, and for a bridge that
lies evenly around. Summing needs neither, and needs a bridge that is large for how sharp the scores are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from worker.composition.estimators import TRUSTED_SAMPLE_SIZE

if TYPE_CHECKING:
    from service.contract.losses import Critic

CONCENTRATED: Final = 0.3
"""Length of the mean bridge vector from which on comparing vectors ranks worse than summing does."""
SPREAD: Final = 0.25
"""And below which comparing ranks as well or better, if the sum is uncertain."""
AGREEING: Final = 0.95
"""Rank correlation of the two from which on they are one answer."""


def choose(
    critic: Critic,
    *,
    comparable: bool,
    resultant: float | None,
    sample_size: float,
    rank_agreement: float | None,
) -> tuple[Literal["direct", "marginal"], str]:
    """Return the method and the reason for it.

    `comparable`: source and target lie in one space. `sample_size`, `rank_agreement`: of the sum, and of the sum with
    direct comparison, medians over a block of sources and targets. The thresholds are measured ones, on trained cosine
    critics and on mixtures of which the truth is known.
    """
    if not comparable:
        return "marginal", "the models encode what joins them differently, so vectors cannot be compared"
    if critic == "dot":
        return "marginal", "inner products of vectors of different lengths rank badly across a bridge"
    if sample_size >= TRUSTED_SAMPLE_SIZE:
        agreement = ""
        if rank_agreement is not None and rank_agreement >= AGREEING:
            agreement = f", and comparing vectors gives the same order (rank correlation {rank_agreement:.2f})"
        return "marginal", f"the bridge carries the sum (effective sample size {sample_size:.0f}){agreement}"
    weak = f"few bridge items carry the sum (effective sample size {sample_size:.1f})"
    if critic == "squared_distance":
        # How round a normal bridge lies does not show in its mean direction; that the two agree does.
        if rank_agreement is not None and rank_agreement >= AGREEING:
            return "direct", f"{weak}, and comparing vectors agrees with it (rank correlation {rank_agreement:.2f})"
        return "marginal", f"{weak}, but comparing vectors ranks differently: trust neither's numbers"
    if resultant is not None and resultant > CONCENTRATED:
        return "marginal", f"the bridge is concentrated (mean vector of length {resultant:.2f}); {weak}"
    if resultant is not None and resultant < SPREAD:
        return "direct", f"{weak}, and the bridge lies evenly around (mean vector of length {resultant:.2f})"
    if rank_agreement is not None and rank_agreement >= AGREEING:
        return "direct", f"{weak}, and comparing vectors agrees with it (rank correlation {rank_agreement:.2f})"
    return "marginal", f"{weak}, but nothing says that comparing vectors ranks better"
