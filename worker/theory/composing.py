"""What the experiments measure of a composition: recall within groups of triples, summed over bridges of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import torch

from worker.composition import estimators
from worker.composition.diagnostics import resultant
from worker.composition.streaming import log_matmul
from worker.learning import critics, retrieval

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from worker.theory.gaussian import Ratio, Triples
    from worker.theory.links import Trained

GROUP: Final = 32
"""Candidates among which each a is to find its c; chance is 1 / 32."""
CHANCE: Final = 1 / GROUP
DETAILED: Final = 20_000
"""Bridge items up to which a sum comes with what `estimators.marginal` says of it; beyond, with its value alone."""

Legs = Callable[[slice], tuple["Float[Tensor, 'source bridge']", "Float[Tensor, 'bridge target']"]]
"""The scores of both legs, scales included, for the sources and the targets of a group."""


def recall(score: Callable[[slice], Float[Tensor, "source target"]], num: int) -> float:
    """Return recall@1 of consecutive groups of 32, ties being in random order; what is left over is not counted.

    `score` compares all sources of a group with all its targets, the right one being in the source's own place.
    """
    return _mean([_hits(score(group)) for group in _groups(num)])


def direct_recall(first: Trained, second: Trained, triples: Triples, names: tuple[str, str] = ("a", "c")) -> float:
    """Return the recall of comparing the vectors of two models, or of one, as their critic does."""
    z_a, z_c = first.embed(names[0], triples.a), second.embed(names[1], triples.c)
    return recall(lambda group: estimators.direct(first.critic, z_a[group], z_c[group]), len(z_a))


def summed_recall(legs: Legs, num: int, num_bridge: int, check: Callable[[], None]) -> tuple[float, float]:
    """Return the recall of summing over the bridge's first items: as it is, and without the targets' offsets.

    InfoNCE leaves log E_b e^f of each leg free. That of the first leg changes no ranking, that of the second does.
    """
    plain: list[Tensor] = []
    normalised: list[Tensor] = []
    for group in _groups(num):
        check()
        f_source, f_target = legs(group)
        f_source, f_target = f_source[:, :num_bridge].double(), f_target[:num_bridge].double()
        if num_bridge <= DETAILED:
            found = estimators.marginal(f_source, f_target, normalise=False).log_ratio
        else:
            found = log_matmul(f_source, f_target)
        plain.append(_hits(found))
        normalised.append(_hits(found - f_target.logsumexp(0)))
    return _mean(plain), _mean(normalised)


def learned(
    first: Trained,
    second: Trained,
    triples: Triples,
    bridge: Float[Tensor, "bridge observed"],
    *,
    scale: float | None = None,
) -> Legs:
    """Return the legs a to b and b to c of two models, or twice of one; each encodes the bridge by itself."""
    link, onward = first.link("a", "b", scale=scale), second.link("b", "c", scale=scale)
    z_a, z_c = first.embed("a", triples.a), second.embed("c", triples.c)
    z_b, z_b_onward = first.embed("b", bridge), second.embed("b", bridge)
    return lambda group: (link.scores(z_a[group], z_b), onward.scores(z_b_onward, z_c[group]))


def exact(first: Ratio, second: Ratio, triples: Triples, bridge: Float[Tensor, "bridge observed"]) -> Legs:
    """Return the legs of the true ratios."""
    return lambda group: (first.scores(triples.a[group], bridge), second.scores(bridge, triples.c[group]))


def ratio_recall(ratio: Ratio, triples: Triples) -> float:
    """Return the recall of a closed form for a and c."""
    return recall(lambda group: ratio.scores(triples.a[group], triples.c[group]), len(triples.a))


def mean_length(first: Trained, bridge: Float[Tensor, "bridge observed"]) -> float:
    """Return the length of the mean unit vector of the bridge."""
    return resultant(critics.prepare("cosine", first.embed("b", bridge)))


def _groups(num: int) -> list[slice]:
    return [slice(begin, begin + GROUP) for begin in range(0, num - GROUP + 1, GROUP)]


def _hits(scores: Float[Tensor, "source target"]) -> Float[Tensor, ""]:
    return retrieval.hits_at_k(scores, torch.eye(GROUP, dtype=torch.bool), 1)[0].mean()


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean())
