"""What b does not see cannot be composed: assumption A1 of Che & Eysenbach (2025), broken little by little.

A share rho of what a and c have in common goes past b. The best composition there is, Lemma 1 with exact ratios and
an endless bridge, falls to chance while a direct model of a and c would lose nothing. The paper's own ablation did not
test this (its errata say so); the set-up is that of its later code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from worker.composition import independence
from worker.composition.diagnostics import spearman
from worker.theory import composing, gaussian
from worker.theory.findings import Outcome, Setting, at_least, at_most, curve, finding

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor

DIMS: Final = (16, 8, 16)
NOISE: Final = 1.0
BYPASSES: Final = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
RANKED: Final = (0.0, 0.25, 0.5, 0.75)
NUM_TRIPLES: Final = 960
NUM_DIAGNOSED: Final = 512
_BEFORE: Final = dict(
    zip(
        BYPASSES,
        (
            ".915 / .869 / 0",
            ".898 / .768 / 1.25",
            ".916 / .682 / 2.51",
            ".922 / .539 / 3.85",
            ".909 / .338 / 4.77",
            ".899 / .177 / 5.21",
            ".918 / .031 / 5.48",
        ),
        strict=True,
    )
)


def seen(triples: gaussian.Triples) -> float:
    """Return what the diagnostic of compositions sees of I(a; c | b) on triples, nats."""
    return float(independence.measure(triples.a, triples.b, triples.c).nats.mean())


def joined(first: gaussian.Triples, second: gaussian.Triples) -> gaussian.Triples:
    """Make triples of pairs: each (a, b) with the (b, c) whose b is nearest. a and c know of each other by b alone."""
    distances: Float64[Tensor, "first second"] = torch.cdist(first.b, second.b)
    return gaussian.Triples(first.a, first.b, second.c[distances.argmin(1)])


@final
@dataclass(frozen=True)
class Measured:
    """By seed and bypass: recalls, and nats of I(a; c | b)."""

    bayes: list[list[float]] = field(default_factory=list[list[float]])
    composed: list[list[float]] = field(default_factory=list[list[float]])
    on_twin: list[list[float]] = field(default_factory=list[list[float]])
    """Of Lemma 1, minus Bayes, on the law of the same pairs without a bypass."""
    true: list[list[float]] = field(default_factory=list[list[float]])
    from_triples: list[list[float]] = field(default_factory=list[list[float]])
    from_pairs: list[list[float]] = field(default_factory=list[list[float]])


def num_runs(num_seeds: int) -> int:
    """Return how many steps of progress there are."""
    return num_seeds * len(BYPASSES)


def run(setting: Setting) -> Outcome:
    """Measure recall of both closed forms, and the diagnostic, at every bypass."""
    found = Measured()
    for seed in setting.seeds:
        for rows in (found.bayes, found.composed, found.on_twin, found.true, found.from_triples, found.from_pairs):
            rows.append([])
        for bypass in BYPASSES:
            setting.check()
            law = gaussian.views(seed, DIMS, noise=NOISE, bypass=bypass)
            rng = np.random.default_rng(seed + 1)
            tested = law.draw(NUM_TRIPLES, rng)
            found.bayes[-1].append(composing.ratio_recall(law.whole, tested))
            found.composed[-1].append(composing.ratio_recall(law.composed, tested))
            twin = law.without_bypass()
            drawn = twin.draw(NUM_TRIPLES, rng)
            found.on_twin[-1].append(
                composing.ratio_recall(law.composed, drawn) - composing.ratio_recall(twin.whole, drawn)
            )
            found.true[-1].append(law.bypassed_information)
            found.from_triples[-1].append(seen(law.draw(NUM_DIAGNOSED, rng)))
            found.from_pairs[-1].append(seen(joined(law.draw(NUM_DIAGNOSED, rng), law.draw(NUM_DIAGNOSED, rng))))
            setting.step()
    outcome = Outcome(
        set_up=[
            (
                "b ~ N(mu, R^T R) in 8 dimensions; a = sqrt(1 - rho) M_a b + sqrt(rho) N_a u + noise, and so c with "
                "the same u, which is drawn as b is and independently of it; 16 dimensions each, noise 1."
            ),
            (
                f"Recall@1 among 32 of {NUM_TRIPLES} triples, by closed forms: the true ratio of a and c (Bayes), and "
                "Lemma 1 with exact ratios and an endless bridge. Ties count as random order: at rho = 1 all scores "
                "of Lemma 1 are equal."
            ),
            (
                f"The diagnostic: what the one of compositions sees of I(a; c | b) on {NUM_DIAGNOSED} triples, and on "
                "as many pairs of each side, joined where their b are nearest."
            ),
        ]
    )
    _judge(outcome, found)
    axis = ("bypass rho", BYPASSES)
    outcome.curves += [
        curve(
            "recall",
            "What a bypass costs composition",
            axis,
            "recall@1 of 32",
            {"Bayes": found.bayes, "Lemma 1, exact": found.composed},
        ),
        curve(
            "information",
            "I(a; c | b): from triples it shows, from pairs it cannot",
            axis,
            "nats",
            {"true": found.true, "from triples": found.from_triples, "from pairs joined by b": found.from_pairs},
        ),
    ]
    outcome.notes += [
        (
            "From pairs alone A1 cannot be tested, by anybody: for every rho there is a law with the very same pairs "
            "(a, b) and (b, c) in which A1 holds, and on it Lemma 1 is as good as Bayes. Some triples are needed."
        ),
        "A composition of one's own data should therefore be checked on a few hundred triples before it is believed.",
    ]
    return outcome


def _judge(outcome: Outcome, found: Measured) -> None:
    outcome.findings += [
        finding(
            "Lemma 1: largest rise of recall from one rho to the next",
            "exact ratios, endless bridge",
            "below 0: it falls all the way",
            [max(after - before for before, after in pairwise(row)) for row in found.composed],
            at_most(0.0),
        ),
        finding(
            "Lemma 1: |recall at rho = 1 - chance|",
            "all scores are equal",
            "0; measured before: .031 is chance",
            [abs(row[-1] - composing.CHANCE) for row in found.composed],
            at_most(1e-9),
        ),
        finding(
            "Bayes: |recall at rho = 1 - recall at rho = 0|",
            "difference of recalls",
            "small: a and c are as close as ever; measured before: .003",
            [abs(row[-1] - row[0]) for row in found.bayes],
            at_most(0.1, mean=True),
        ),
        finding(
            "Bayes: lowest recall over rho",
            "closed form",
            "flat at about .9 (.999 at the paper's size)",
            [min(row) for row in found.bayes],
            at_least(0.75),
        ),
        finding(
            "the diagnostic ranks rho = 0, .25, .5, .75 right",
            f"1 if what it sees on {NUM_DIAGNOSED} triples grows with each",
            "in at least 9 of 10 seeds",
            [float(is_rising([row[BYPASSES.index(rho)] for rho in RANKED])) for row in found.from_triples],
            at_least(0.9, mean=True),
        ),
        finding(
            "the diagnostic: largest excess over I(a; c | b)",
            "what it sees minus the closed form, over all rho, nats",
            "about 0: it shows at most what there is, but for the draw of the triples",
            [
                max(one - other for one, other in zip(*rows, strict=True))
                for rows in zip(found.from_triples, found.true, strict=True)
            ],
        ),
        finding(
            "Lemma 1 on the twin with the same pairs: |recall minus Bayes of the twin|",
            "largest over rho; a and c of the twin are independent given b",
            "0: nothing in the pairs tells the twin, where composing is perfect, from the law, where it fails",
            [max(map(abs, row)) for row in found.on_twin],
            at_most(1e-9),
        ),
        finding(
            "the diagnostic from pairs joined by b: Spearman with rho",
            "as from triples, but of pairs of both sides whose b are nearest",
            "not 1: it does not see the bypass",
            [_correlation(row) for row in found.from_pairs],
        ),
        finding(
            "the diagnostic from pairs joined by b, at rho = .75",
            "nats",
            "near 0 where the truth is 4 to 5",
            [row[BYPASSES.index(0.75)] for row in found.from_pairs],
        ),
    ]
    for column, rho in enumerate(BYPASSES):
        before = f"measured before (Bayes / Lemma 1 with 20,000 b / nats): {_BEFORE[rho]}"
        outcome.findings += [
            finding(f"rho = {rho:g}: Bayes", "recall@1 of 32", before, [row[column] for row in found.bayes]),
            finding(
                f"rho = {rho:g}: Lemma 1, exact", "recall@1 of 32", before, [row[column] for row in found.composed]
            ),
            finding(f"rho = {rho:g}: I(a; c | b)", "closed form, nats", before, [row[column] for row in found.true]),
            finding(
                f"rho = {rho:g}: the diagnostic", "nats", "at most that", [row[column] for row in found.from_triples]
            ),
        ]


def is_rising(values: list[float]) -> bool:
    """Tell whether each is above the one before."""
    return all(after > before for before, after in pairwise(values))


def _correlation(values: list[float]) -> float:
    correlation = float(spearman(torch.tensor([values]), torch.tensor([BYPASSES])))
    return 0.0 if math.isnan(correlation) else correlation
