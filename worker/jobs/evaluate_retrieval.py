"""The retrieval part of an evaluation: how well one modality finds another, whether or not the two were paired."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Final, final

import torch

from service.contract.recipe import pair_name
from worker.composition import estimators
from worker.jobs.report import Retrieval
from worker.learning import retrieval
from worker.learning.heldout import payload_classes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from jaxtyping import Float, Int64
    from torch import Tensor

    from worker.learning.data import Evaluated
    from worker.learning.model import Loaded

    Side = tuple[Float[Tensor, "item dim"], Int64[Tensor, " item"]]
    """Vectors, and the class that decides what is relevant."""

SCORES_AT_ONCE: Final = 1 << 22  # of a leg: about ten arrays of this size in float64 are in memory


def within(loaded: Loaded, evaluated: list[Evaluated], ks: list[int], check: Callable[[], None]) -> Iterator[Retrieval]:
    """Measure the pairs that a data set holds together: find the partner. `check` may raise to stop the work."""
    for one in evaluated:
        for source, target in _both_ways(combinations(sorted(one.vectors), 2)):
            partners = payload_classes(one.dataset, target, one.indices)
            sides = (one.vectors[source], partners), (one.vectors[target], partners)
            for entry in _measure(loaded, (source, target), sides, ks, check):
                yield entry.model_copy(update={"dataset": one.dataset.name, "relevant": "partner"})


def across(loaded: Loaded, evaluated: list[Evaluated], ks: list[int], check: Callable[[], None]) -> Iterator[Retrieval]:
    """Measure the pairs that no data set holds together: find a target with the same label."""
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
            yield from _measure(loaded, (source, target), sides, ks, check)


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


def _measure(
    loaded: Loaded, direction: tuple[str, str], sides: tuple[Side, Side], ks: list[int], check: Callable[[], None]
) -> Iterator[Retrieval]:
    """Measure one direction: directly, and over every bridge if the pair was not trained."""
    source, target = direction
    (z_source, source_classes), (z_target, target_classes) = sides
    check()
    chance = retrieval.by_nothing(len(z_source), len(z_target))
    chance_recall, chance_precision = retrieval.at_ks(chance, source_classes, target_classes, ks)
    cosine = retrieval.by_cosine(z_source, z_target)
    recall, precision = retrieval.at_ks(cosine, source_classes, target_classes, ks)
    entry = Retrieval(
        source=source,
        target=target,
        trained=loaded.model.is_trained(source, target),
        dataset=None,
        relevant="label",
        method="direct",
        num_queries=len(z_source),
        num_targets=len(z_target),
        recall=recall,
        precision=precision,
        chance_recall=chance_recall,
        chance_precision=chance_precision,
    )
    yield entry
    if entry.trained:
        return
    for through, bridge in _bridges(loaded, source, target):
        scales = float(loaded.model.scale(source, through)), float(loaded.model.scale(through, target))
        summed = Summed(scales, bridge, z_source, z_target, check)
        recall, precision = retrieval.at_ks(summed, source_classes, target_classes, ks)
        yield entry.model_copy(
            update={
                "method": "marginal",
                "through": through,
                "bridge_size": len(bridge),
                "recall": recall,
                "precision": precision,
                "effective_sample_size": summed.effective_sample_size,
                "trusted_fraction": summed.trusted_fraction,
            }
        )


@final
class Summed:
    """Scores queries over a bridge with the trained scale of each leg, and keeps the diagnostics of every query.

    Works on squares of at most `SCORES_AT_ONCE` scores, so memory does not grow with the number of queries and targets
    beyond the answer itself.
    """

    def __init__(
        self,
        scales: tuple[float, float],
        bridge: Float[Tensor, "bridge dim"],
        z_source: Float[Tensor, "source dim"],
        z_target: Float[Tensor, "target dim"],
        check: Callable[[], None],
    ) -> None:
        self._scales, self._bridge, self._check = scales, bridge, check
        self._z_source, self._z_target = z_source, z_target
        self._sample_sizes: list[Float[Tensor, " query"]] = []

    def __call__(self, block: slice) -> Float[Tensor, "query target"]:
        """Return log-ratios, and note the median effective sample size of each query."""
        width = max(1, SCORES_AT_ONCE // len(self._bridge))
        rows: list[Tensor] = []
        for z_source in self._z_source[block].split(width):
            f_source = self._scales[0] * z_source @ self._bridge.T
            found: list[estimators.Marginal] = []
            for z_target in self._z_target.split(width):
                self._check()
                f_target = self._scales[1] * self._bridge @ z_target.T
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
