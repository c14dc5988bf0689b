"""The retrieval part of an evaluation: how well one modality finds another, whether or not the two were paired."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final, final

import torch

from service.contract.recipe import pair_name
from worker.composition import estimators
from worker.evaluation import estimates
from worker.jobs.report import Retrieval
from worker.learning import critics, retrieval
from worker.learning.heldout import payload_classes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jaxtyping import Float, Int64
    from torch import Tensor

    from service.contract.losses import Critic
    from worker.jobs.evaluate_scope import Scope
    from worker.learning.data import Evaluated
    from worker.learning.model import Loaded

    Side = tuple[Float[Tensor, "item dim"], Int64[Tensor, " item"]]
    """Vectors, and the class that decides what is relevant."""

SCORES_AT_ONCE: Final = 1 << 22  # of a leg: about ten arrays of this size in float64 are in memory


def within(scope: Scope) -> Iterator[Retrieval]:
    """Measure the pairs that a data set holds together: find the partner."""
    for one in scope.evaluated:
        for source, target in _both_ways(combinations(sorted(one.vectors), 2)):
            partners = payload_classes(one.dataset, target, one.indices)
            sides = (one.vectors[source], partners), (one.vectors[target], partners)
            for entry in _measure(scope, (source, target), sides):
                yield entry.model_copy(update={"dataset": one.dataset.name, "relevant": "partner"})


def across(scope: Scope) -> Iterator[Retrieval]:
    """Measure the pairs that no data set holds together: find a target with the same label."""
    evaluated = scope.evaluated
    together = {pair for one in evaluated for pair in combinations(sorted(one.vectors), 2)}
    modalities = sorted({modality for one in evaluated for modality in one.vectors})
    apart = [pair for pair in combinations(modalities, 2) if pair not in together]
    for source, target in _both_ways(apart):
        z_source, source_labels = _labelled(evaluated, source)
        z_target, target_labels = _labelled(evaluated, target)
        findable = set(target_labels)
        kept = [at for at, label in enumerate(source_labels) if label in findable]
        if kept:
            source_classes, target_classes = retrieval.classes([source_labels[at] for at in kept], target_labels)
            sides = (z_source[kept], source_classes), (z_target, target_classes)
            yield from _measure(scope, (source, target), sides)
        else:
            scope.leave_out("retrieval", None, f"{source}->{target}", "no data set holds both, and they share no label")


def _both_ways(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for first, second in pairs:
        yield first, second
        yield second, first


def _labelled(evaluated: list[Evaluated], modality: str) -> tuple[Float[Tensor, "item dim"], list[str]]:
    """Pool the labelled samples of a modality over the data sets."""
    vectors: list[Tensor] = []
    labels: list[str] = []
    for one in evaluated:
        if modality in one.vectors:
            kept = [at for at, label in enumerate(one.labels) if label]
            vectors.append(one.vectors[modality][kept])
            labels += [one.labels[at] for at in kept]
    return torch.cat(vectors), labels


def _measure(scope: Scope, direction: tuple[str, str], sides: tuple[Side, Side]) -> Iterator[Retrieval]:
    """Measure one direction: directly, and over every bridge if the pair was not trained."""
    loaded, ks, check = scope.loaded, scope.ks, scope.ctx.check
    source, target = direction
    (z_source, source_classes), (z_target, target_classes) = sides
    check()
    chance = retrieval.by_nothing(len(z_source), len(z_target))
    chance_recall, chance_precision = retrieval.at_ks(chance, source_classes, target_classes, ks)

    def direct(block: slice) -> Float[Tensor, "query target"]:
        check()
        return scope.scores(z_source[block], z_target)

    found = retrieval.hits_at_ks(direct, source_classes, target_classes, ks)
    entry = Retrieval(
        source=source,
        target=target,
        trained=loaded.model.is_trained(source, target),
        dataset=None,
        relevant="label",
        method="direct",
        num_queries=len(z_source),
        num_targets=len(z_target),
        recall=_means(found[0]),
        precision=_means(found[1]),
        recall_standard_error=_errors(found[0]),
        precision_standard_error=_errors(found[1]),
        chance_recall=chance_recall,
        chance_precision=chance_precision,
    )
    yield entry
    if entry.trained:
        return
    for through, bridge in _bridges(loaded, source, target):
        scales = float(loaded.model.scale(source, through)), float(loaded.model.scale(through, target))
        summed = Summed(loaded.recipe.critic, scales, bridge, z_source, z_target, check=check)
        found = retrieval.hits_at_ks(summed, source_classes, target_classes, ks)
        yield entry.model_copy(
            update={
                "method": "marginal",
                "through": through,
                "bridge_size": len(bridge),
                "recall": _means(found[0]),
                "precision": _means(found[1]),
                "recall_standard_error": _errors(found[0]),
                "precision_standard_error": _errors(found[1]),
                "effective_sample_size": summed.effective_sample_size,
                "trusted_fraction": summed.trusted_fraction,
            }
        )


def _means(by_k: dict[int, Float[Tensor, " query"]]) -> dict[int, float]:
    return {k: float(each.sum()) / len(each) for k, each in by_k.items()}


def _errors(by_k: dict[int, Float[Tensor, " query"]]) -> dict[int, float] | None:
    found = {k: estimates.mean(each).standard_error for k, each in by_k.items()}
    return {k: error for k, error in found.items() if error is not None} or None


@final
class Summed:
    """Scores queries over a bridge with the trained scale of each leg, and keeps the diagnostics of every query.

    Works on squares of at most `SCORES_AT_ONCE` scores, so memory does not grow with the number of queries and targets
    beyond the answer itself.
    """

    def __init__(
        self,
        critic: Critic,
        scales: tuple[float, float],
        bridge: Float[Tensor, "bridge dim"],
        z_source: Float[Tensor, "source dim"],
        z_target: Float[Tensor, "target dim"],
        *,
        check: Callable[[], None],
    ) -> None:
        self._critic: Critic = critic
        self._scales, self._bridge, self._check = scales, bridge, check
        self._z_source, self._z_target = z_source, z_target
        self._sample_sizes: list[Float[Tensor, " query"]] = []

    def __call__(self, block: slice) -> Float[Tensor, "query target"]:
        """Return log-ratios, and note the median effective sample size of each query."""
        width = max(1, SCORES_AT_ONCE // len(self._bridge))
        rows: list[Tensor] = []
        for z_source in self._z_source[block].split(width):
            f_source = self._scales[0] * critics.scores(self._critic, z_source, self._bridge)
            found: list[estimators.Marginal] = []
            for z_target in self._z_target.split(width):
                self._check()
                f_target = self._scales[1] * critics.scores(self._critic, self._bridge, z_target)
                found.append(estimators.marginal(f_source, f_target, normalise=True))
            sizes = torch.cat([each.effective_sample_size for each in found], 1)
            self._sample_sizes.append(sizes.median(1).values)
            rows.append(torch.cat([each.log_ratio for each in found], 1))
        return torch.cat(rows)

    @property
    def effective_sample_size(self) -> float:
        """The median over the targets, then over the queries."""
        return float(torch.cat(self._sample_sizes).median())

    @property
    def trusted_fraction(self) -> float:
        """The share of the queries whose values can be used and not only their order."""
        return float((torch.cat(self._sample_sizes) >= estimators.TRUSTED_SAMPLE_SIZE).double().mean())


def _bridges(loaded: Loaded, source: str, target: str) -> Iterator[tuple[str, Float[Tensor, "bridge dim"]]]:
    """Yield each modality that was trained with both, with its vectors from both banks."""
    for through in sorted(loaded.recipe.towers):
        legs = [loaded.banks.get(pair_name(through, end)) for end in (source, target)]
        vectors = [leg.vectors[through].cpu() for leg in legs if leg is not None]
        if len(vectors) == len(legs):
            yield through, torch.cat(vectors)
