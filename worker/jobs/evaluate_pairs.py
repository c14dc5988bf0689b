"""The parts of an evaluation that look at two modalities together: geometry, margins, completeness."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from worker.evaluation import completeness, geometry, margins
from worker.jobs.report import PairCompleteness, PairGeometry, PairMargins
from worker.learning import retrieval
from worker.learning.heldout import payload_classes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Bool, Float, Int64
    from torch import Tensor

    from worker.jobs.evaluate_scope import Scope
    from worker.learning.data import Evaluated

COMPARED_SAMPLES: Final = 8192  # with each other, for uniformity
NUM_BINS: Final = 15


def geometries(scope: Scope) -> Iterator[PairGeometry]:
    """Measure alignment, uniformity and gap of every two modalities that a data set holds together."""
    for one, first, second in scope.pairs():
        num = len(one.indices)
        if num < 2:
            scope.leave_out("geometry", one.dataset.name, f"{first}+{second}", "there is one sample")
            continue
        order = scope.shuffled(num)
        z = [functional.normalize(one.vectors[modality], dim=1)[order] for modality in (first, second)]
        gap, by_chance = geometry.gap(z[0], z[1])
        found = geometry.Geometry(
            num_samples=num,
            alignment=geometry.alignment(z[0], z[1]),
            uniformity={
                modality: geometry.uniformity(each[:COMPARED_SAMPLES], scope.ctx.check)
                for modality, each in zip((first, second), z, strict=True)
            },
            gap=gap,
            gap_by_chance=by_chance,
            separable=geometry.separable(z[0], z[1]),
        )
        yield PairGeometry(
            dataset=one.dataset.name,
            first=first,
            second=second,
            trained=scope.loaded.model.is_trained(first, second),
            geometry=found,
        )


def all_margins(scope: Scope) -> Iterator[PairMargins]:
    """Measure the margins of every two modalities that a data set holds together, in batches as a loss sees them."""
    for one, first, second in scope.pairs():
        labels = _label_classes(one)
        at = torch.arange(len(one.indices)) if labels is None else labels[0]
        at = at[scope.shuffled(len(at))]
        payloads = None
        if labels is None:
            payloads = [payload_classes(one.dataset, modality, one.indices) for modality in (first, second)]
        trained = scope.loaded.model.is_trained(first, second)
        found = margins.measure(
            _batches(scope, one, (first, second), at, [labels[1]] if labels else payloads or []),
            (first, second),
            "label" if labels else "payload",
            float(scope.loaded.model.scale(first, second)) if trained else None,
            scope.args.bins or NUM_BINS,
        )
        if isinstance(found, str):
            scope.leave_out("margins", one.dataset.name, f"{first}+{second}", found)
        else:
            yield PairMargins(
                dataset=one.dataset.name,
                first=first,
                second=second,
                trained=scope.loaded.model.is_trained(first, second),
                margins=found,
            )


def all_completeness(scope: Scope) -> Iterator[PairCompleteness]:
    """Estimate the completeness of the score of every two modalities that a labelled data set holds together."""
    for one, first, second in scope.pairs():
        labels = _label_classes(one)
        if labels is None:
            reason = "fewer than two labels: it needs classes"
            scope.leave_out("completeness", one.dataset.name, f"{first}+{second}", reason)
            continue
        at, classes = labels
        at = at[scope.shuffled(len(at), completeness.MAX_SAMPLES)]
        if len(classes[at].unique()) < 2:
            scope.leave_out("completeness", one.dataset.name, f"{first}+{second}", "one label alone was drawn")
            continue
        scores = scope.scores(one.vectors[first][at], one.vectors[second][at]).double()
        bound = 1.0 if scope.loaded.recipe.critic == "cosine" else max(float(scores.abs().max()), 1e-12)
        found = completeness.measure(scores, classes[at], bound, scope.args.seed, scope.ctx.check)
        trained = scope.loaded.model.is_trained(first, second)
        yield PairCompleteness(
            dataset=one.dataset.name, first=first, second=second, trained=trained, completeness=found
        )


def _label_classes(one: Evaluated) -> tuple[Int64[Tensor, " labelled"], Int64[Tensor, " item"]] | None:
    """Return where the labelled samples are, and the class of every sample; None with fewer than two labels."""
    labelled = [at for at, label in enumerate(one.labels) if label]
    if len({one.labels[at] for at in labelled}) < 2:
        return None
    return torch.tensor(labelled), retrieval.classes(one.labels)[0]


def _batches(
    scope: Scope,
    one: Evaluated,
    names: tuple[str, str],
    order: Int64[Tensor, " item"],
    classes: list[Int64[Tensor, " item"]],
) -> Iterator[tuple[Float[Tensor, "item item"], Bool[Tensor, "item item"]]]:
    """Yield the scores of each batch and which are negatives: they differ in every sort of class."""
    size = min(margins.BATCH, len(order))
    for start in range(0, len(order) - size + 1, size):
        scope.ctx.check()
        at = order[start : start + size]
        negatives = torch.ones(size, size, dtype=torch.bool)
        for each in classes:
            negatives &= each[at][:, None] != each[at]
        yield scope.scores(one.vectors[names[0]][at], one.vectors[names[1]][at]), negatives
