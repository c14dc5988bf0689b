"""The linear probe of an evaluation: learned from the training split of a data set, measured on its holdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from worker.evaluation import probe
from worker.jobs.report import Probed
from worker.learning.data import draw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from worker.jobs.evaluate_scope import Scope

TRAIN_SAMPLES: Final = 10_000  # the regression cannot be stopped while it fits


def probes(scope: Scope) -> Iterator[Probed]:
    """Probe every modality of every data set that has labels in both splits."""
    for one in scope.evaluated:
        samples, name = one.dataset.samples, one.dataset.name
        if scope.args.split != "holdout":
            scope.leave_out("linear_probe", name, "", "it is measured on split holdout only")
            continue
        if not any(one.labels):
            scope.leave_out("linear_probe", name, "", "no sample has a label")
            continue
        indices = draw(samples, "train", min(TRAIN_SAMPLES, scope.args.max_samples), scope.args.seed)
        labels = [samples.label(index) for index in indices.tolist()]
        if len({label for label in labels if label}) < 2:
            scope.leave_out("linear_probe", name, "", "fewer than two labels in the training split")
            continue
        for modality, vectors in one.vectors.items():
            train = scope.encode(one.dataset, modality, indices)
            found = probe.measure((train, labels), (vectors, one.labels), scope.args.seed, scope.ctx.check)
            if isinstance(found, str):
                scope.leave_out("linear_probe", name, modality, found)
            else:
                yield Probed(dataset=name, modality=modality, probe=found)
