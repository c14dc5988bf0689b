"""The retrieval part of an evaluation: how well one modality finds another, whether or not the two were paired."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

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
        f_source = loaded.model.scale(source, through).cpu() * z_source @ bridge.T
        f_target = loaded.model.scale(through, target).cpu() * bridge @ z_target.T
        summed = _Summed(f_source, f_target, check)
        recall, precision = retrieval.at_ks(summed, source_classes, target_classes, ks)
        yield entry.model_copy(
            update={
                "method": "marginal",
                "through": through,
                "bridge_size": len(bridge),
                "recall": recall,
                "precision": precision,
                "effective_sample_size": float(torch.cat(summed.sample_sizes).median()),
                "trusted_fraction": float(torch.cat(summed.trusted).double().mean()),
            }
        )


class _Summed:
    """Scores queries over a bridge, and keeps the diagnostics of every block."""

    def __init__(
        self,
        f_source: Float[Tensor, "source bridge"],
        f_target: Float[Tensor, "bridge target"],
        check: Callable[[], None],
    ) -> None:
        self._f_source, self._f_target, self._check = f_source, f_target, check
        self.sample_sizes: list[Float[Tensor, " query"]] = []
        self.trusted: list[Float[Tensor, " query"]] = []

    def __call__(self, block: slice) -> Float[Tensor, "query target"]:
        self._check()
        answer = estimators.marginal(self._f_source[block], self._f_target, normalise=True)
        self.sample_sizes.append(answer.effective_sample_size.median(1).values)
        self.trusted.append(answer.trusted)
        return answer.log_ratio


def _bridges(loaded: Loaded, source: str, target: str) -> Iterator[tuple[str, Float[Tensor, "bridge dim"]]]:
    """Yield each modality that was trained with both, with its vectors from both banks."""
    for through in sorted(loaded.recipe.towers):
        legs = [loaded.banks.get(pair_name(through, end)) for end in (source, target)]
        vectors = [leg.vectors[through].cpu() for leg in legs if leg is not None]
        if len(vectors) == len(legs):
            yield through, torch.cat(vectors)
