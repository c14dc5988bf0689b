"""What the experiments measure of trained encoders, with the code that evaluates models, on fresh data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from worker.evaluation import certificate, margins
from worker.learning import retrieval

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Float64
    from torch import Tensor

    from service.contract.losses import Critic
    from worker.theory.encoders import Encoders
    from worker.theory.generators import Generator

PROMPT_SETS: Final = 20
ITEMS: Final = 250  # classified with each set of prompts
TOP: Final = (1, 3)
MARGIN_BATCH: Final = 64
MARGIN_BATCHES: Final = 20
SCORES_AT_ONCE: Final = 1 << 21
SEED_OF_TESTS: Final = 1_000_003
"""Added to the seed of training: tests draw other data."""


@final
@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification of x by one fresh y of each class."""

    error: dict[int, float]
    """The share of the items whose class is not among the top r, by r."""
    bound: dict[int, float]
    """The certificate of each, corollary 5.1."""
    log_sum_exp: float
    """Mean of log sum_k exp((f(x, y_k) - f(x, y*)) / temperature), in nats: epsilon' of theorem 4.2."""


def zero_shot(generator: Generator, encoders: Encoders, seed: int, *, critic: Critic | None = None) -> ZeroShot:
    """Classify fresh items with several sets of fresh prompts. A tie with the right class counts as random order."""
    rng = np.random.default_rng(SEED_OF_TESTS + seed)
    costs: list[Tensor] = []
    misses: dict[int, list[Tensor]] = {r: [] for r in TOP}
    for _ in range(PROMPT_SETS):
        prompts = generator.prompts(rng)
        pairs = generator.draw(ITEMS, rng)
        scores = encoders.scores(pairs.x, prompts, critic)
        relevant = torch.arange(generator.num_classes) == pairs.z[:, None]
        for r in TOP:
            misses[r].append(1 - retrieval.hits_at_k(scores, relevant, r)[0].double())
        costs.append(certificate.log_sum_exp(encoders.scale * scores, pairs.z))
    cost = torch.cat(costs)
    certified = certificate.certify(cost, {r: torch.cat(found) for r, found in misses.items()})
    return ZeroShot(
        error={each.r: each.error.value for each in certified},
        bound={each.r: each.bound.value for each in certified},
        log_sum_exp=float(cost.mean()),
    )


@final
@dataclass(frozen=True)
class Margins:
    """Means over fresh batches, x against y, in units of the critic."""

    hardest: float
    mean_negative: float
    positive: float


def margin(generator: Generator, encoders: Encoders, seed: int) -> Margins:
    """Measure the margin to the hardest and to the mean negative, items of other classes, in fresh batches of 64."""
    rng = np.random.default_rng(SEED_OF_TESTS + seed)
    found = margins.measure(_batches(generator, encoders, rng), ("x", "y"), "label", None, num_bins=10)
    assert not isinstance(found, str), found
    forth = found.directions[0]
    return Margins(forth.hardest.value, forth.mean_negative.value, found.positive_score.value)


def _batches(
    generator: Generator, encoders: Encoders, rng: np.random.Generator
) -> Iterator[tuple[Float64[Tensor, "item item"], Bool[Tensor, "item item"]]]:
    for _ in range(MARGIN_BATCHES):
        pairs = generator.draw(MARGIN_BATCH, rng)
        yield encoders.scores(pairs.x, pairs.y), pairs.z[:, None] != pairs.z


def excess(generator: Generator, encoders: Encoders, batch_size: int, seed: int, *, num_pairs: int = 40_000) -> float:
    """Return the contrastive loss of fresh batches above its floor, both directions added up as in the paper, nats.

    The floor is each batch's own, mean log(pairs of the anchor's class), whose expectation is the floor of the loss:
    the difference varies far less than the loss.
    """
    rng = np.random.default_rng(SEED_OF_TESTS + seed)
    at_once = max(1, SCORES_AT_ONCE // batch_size**2)
    left = max(1, num_pairs // batch_size)
    found: list[Tensor] = []
    while left > 0:
        num = min(left, at_once)
        left -= num
        pairs = generator.draw(num * batch_size, rng)
        logits = encoders.scale * encoders.batch_scores(pairs, batch_size)
        z = pairs.z.unflatten(0, (num, batch_size))
        same = (z[:, :, None] == z[:, None]).sum(2).double().log()
        positive = logits.diagonal(dim1=1, dim2=2)
        found += [(each.logsumexp(2) - positive - same).mean(1) for each in (logits, logits.mT)]
    return 2 * float(torch.cat(found).mean())
