"""The composition part of an evaluation: whether what it takes for granted holds, pair by pair and bridge by bridge.

Most figures come from the banks of the model. Calibration takes held-out pairs of either leg, and independence given
the bridge takes samples that hold all three modalities.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING, Final, final

import torch

from worker.composition import examination, independence
from worker.evaluation import calibration, estimates
from worker.jobs.report import LegCalibration, PairComposition, PairIndependence
from worker.learning.heldout import payload_classes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.contract.diagnostics import Verdict
    from worker.jobs.evaluate_scope import Scope
    from worker.learning.data import Evaluated

NUM_WAYS: Final = 32
NUM_BINS: Final = 15
CALIBRATED: Final = 0.05
MISLEADING: Final = 0.15


def measure(scope: Scope) -> Iterator[PairComposition]:
    """Measure every ordered pair that was never trained, over every bridge of which both banks are kept."""
    loaded = scope.loaded
    names = sorted(loaded.recipe.towers)
    pairs = [pair for pair in permutations(names, 2) if not loaded.model.is_trained(*pair)]
    if not pairs and scope.args.parts:  # otherwise nobody expects it
        scope.leave_out("composition", None, "", "every two modalities of the model were trained together")
    legs = _Legs(scope)
    for source, target in pairs:
        scope.ctx.check()
        found = list(examination.bridges(loaded, source, target))
        if not found:
            reason = "no modality was trained with both, or the model does not keep its banks"
            scope.leave_out("composition", None, f"{source}->{target}", reason)
        for through, first, second in found:
            with torch.inference_mode():
                known = examination.examine(loaded.recipe.critic, first, second, seed=scope.args.seed)
            yield PairComposition(
                source=source,
                target=target,
                through=through,
                diagnostics=known,
                calibration=[*legs.calibrated(source, through), *legs.calibrated(through, target)],
                independence=list(_independence(scope, source, through, target)),
            )


def judge(expected_calibration_error: float) -> Verdict:
    """Judge whether softmax of a leg's scores is a probability."""
    if expected_calibration_error < CALIBRATED:
        return "passes"
    return "doubtful" if expected_calibration_error < MISLEADING else "fails"


@final
class _Legs:
    """The calibration of trained pairs: each is a leg of many compositions, and measured once."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._known: dict[tuple[str, str], list[LegCalibration]] = {}

    def calibrated(self, source: str, target: str) -> list[LegCalibration]:
        """Return what each data set that holds both says of finding the partner among some."""
        if (found := self._known.get((source, target))) is None:
            held = [one for one in self._scope.evaluated if {source, target} <= one.vectors.keys()]
            measured = [_calibrate(self._scope, one, source, target) for one in held]
            found = self._known[source, target] = [each for each in measured if each is not None]
        return found


def _calibrate(scope: Scope, one: Evaluated, source: str, target: str) -> LegCalibration | None:
    classes = payload_classes(one.dataset, target, one.indices)
    # One sample of each payload: nothing is right or wrong about telling two of the same apart.
    seen: set[int] = set()
    order: list[int] = []
    for at in scope.shuffled(len(classes)).tolist():
        if int(classes[at]) not in seen:
            seen.add(int(classes[at]))
            order.append(at)
    num_ways = min(NUM_WAYS, len(order))
    groups = torch.tensor(order[: len(order) // max(num_ways, 1) * num_ways], dtype=torch.int64)
    if len(groups) < calibration.FEWEST:
        reason = f"fewer than {calibration.FEWEST} different samples: calibration cannot be told"
        scope.leave_out("composition", one.dataset.name, f"{source}->{target}", reason)
        return None
    scale = float(scope.loaded.model.scale(source, target))
    logits = [
        scale * scope.scores(one.vectors[source][at], one.vectors[target][at]).double() for at in groups.split(num_ways)
    ]
    truth = torch.arange(num_ways).repeat(len(logits))
    found = calibration.measure(torch.cat(logits), truth, scope.args.bins or NUM_BINS, scope.args.seed)
    return LegCalibration(
        dataset=one.dataset.name,
        source=source,
        target=target,
        num_ways=num_ways,
        calibration=found,
        verdict=judge(found.expected_calibration_error.value),
    )


def _independence(scope: Scope, source: str, through: str, target: str) -> Iterator[PairIndependence]:
    for one in scope.evaluated:
        if not {source, through, target} <= one.vectors.keys():
            continue
        num = len(one.indices)
        if num < independence.FEWEST:
            reason = f"{num} samples hold all three with {through}: at least {independence.FEWEST} are needed"
            scope.leave_out("composition", one.dataset.name, f"{source}->{target}", reason)
            continue
        order = scope.shuffled(num)
        z = [one.vectors[name][order] for name in (source, through, target)]
        found = independence.measure(z[0], z[1], z[2])
        nats = estimates.mean(found.nats)
        yield PairIndependence(
            dataset=one.dataset.name,
            num_triples=len(found.nats),
            conditional_information=nats,
            num_directions=len(found.correlations),
            verdict=independence.judge(nats.value, nats.standard_error or 0.0),
        )
