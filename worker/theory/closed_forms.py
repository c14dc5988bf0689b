"""The closed forms of the sum over a bridge against drawing the bridge: lemmas 2 and 3 of Che & Eysenbach (2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from worker.composition import closed_forms, estimators
from worker.composition.diagnostics import spearman
from worker.learning import critics
from worker.theory import bridges
from worker.theory.findings import Outcome, Setting, at_least, at_most, curve, finding

if TYPE_CHECKING:
    from jaxtyping import Float64
    from torch import Tensor

SAMPLES: Final = (1_000, 10_000, 100_000)
NUM_TARGETS: Final = 41
SPHERES: Final = {
    "d = 6, s = 1": (6, (1.0, 1.0), ".021 / .0046 / .0017"),
    "d = 16, s = 1": (16, (1.0, 1.0), "not measured"),
    "d = 16, s = 5": (16, (5.0, 5.0), ".085 / .029 / .0096"),
    "d = 64, s = 10": (64, (10.0, 10.0), ".113 / .040 / .012"),
    "d = 6, s = 1 and 3": (6, (1.0, 3.0), "not measured: scales that differ are ours"),
}
"""Name -> dimensions, the scales of both legs, the root mean squared errors measured before."""
JUDGED: Final = {
    ("d = 6, s = 1", 10_000): at_most(0.02),
    ("d = 6, s = 1", 100_000): at_most(0.005),
    ("d = 16, s = 1", 10_000): at_most(0.005, mean=True),
    ("d = 16, s = 1", 100_000): at_most(0.005),
    ("d = 16, s = 5", 100_000): at_most(0.02),
}
WORST_RATIO: Final = 2.0
"""Bar of an error beside the one that the draw has by its variance: errors of all targets go together in one draw."""
ENOUGH: Final = 10_000
"""Draws from which on that variance, of the first order, is the error's."""
NORMAL_DIM: Final = 3
NORMAL_VARIANCES: Final = (0.25, 1.5, 4.0)
NORMAL_SAMPLES: Final = 200_000
REACH: Final = 1.5
"""Largest coordinate of the vectors compared by their distance."""


def num_runs(num_seeds: int) -> int:
    """Return how many steps of progress there are."""
    return num_seeds * (len(SPHERES) + len(NORMAL_VARIANCES))


def run(setting: Setting) -> Outcome:
    """Compare the closed forms with sums over drawn bridges."""
    outcome = Outcome(
        set_up=[
            (
                f"Lemma 2: unit vectors a and {NUM_TARGETS} vectors c whose inner products with a are spread over "
                "[-1, 1]; b even on the sphere; sums over 1,000, 10,000 and 100,000 draws of b."
            ),
            (
                f"Lemma 3: a and {NUM_TARGETS} vectors c drawn from [-{REACH}, {REACH}]^3, f = -1/2 |a - b|^2, "
                f"b ~ N(0, v I) with v = .25, 1.5 and 4; sums over {NORMAL_SAMPLES:,} draws."
            ),
            "The error is that of the logarithm, nats; both sides are the functions that a service composes with.",
        ]
    )
    _spheres(setting, outcome)
    _normals(setting, outcome)
    outcome.notes += [
        (
            "What is left is the error of the draw, which falls as 1 / sqrt(draws): the curves are straight lines of "
            "that slope. A closed form has none, and holds only where the bridge has the lemma's shape."
        ),
        (
            "At d = 6 and s = 1 a sum over 10,000 draws has an error of .0058 by its variance, so that .005 cannot be "
            "asked of it, though often measured: its bars there are .02 and the ratio."
        ),
    ]
    return outcome


def _spheres(setting: Setting, outcome: Outcome) -> None:
    errors: dict[str, list[list[float]]] = {}
    for name, (dim, scales, before) in SPHERES.items():
        of_closed: list[float] = []
        of_sums: list[list[float]] = []
        of_draw: list[list[float]] = []
        errors[name] = []
        for seed in setting.seeds:
            rng = np.random.default_rng(seed)
            a, c, cosines = _around(dim, rng)
            exact = closed_forms.sphere(a, c, scales, normalise=False)
            of_closed.append(float(spearman(exact, cosines)))
            errors[name].append([])
            of_sums.append([])
            of_draw.append([error_of_draw(a, c, scales, num) for num in SAMPLES])
            for num in SAMPLES:
                setting.check()
                b = bridges.even(num, dim, rng)
                f_ab, f_bc = (
                    scale * critics.scores("cosine", *pair)
                    for scale, pair in zip(scales, ((a, b), (b, c)), strict=True)
                )
                drawn = estimators.marginal(f_ab, f_bc, normalise=False).log_ratio
                errors[name][-1].append(float((drawn - exact).square().mean().sqrt()))
                of_sums[-1].append(float(spearman(drawn, cosines)))
            setting.step()
        outcome.findings.append(
            finding(
                f"sphere, {name}: Spearman of closed form and <a, c>",
                "rank correlation over the targets",
                "1: it grows with <a, c> (lemma 2)",
                of_closed,
                at_least(1 - 1e-9),
            )
        )
        for column, num in enumerate(SAMPLES):
            outcome.findings += [
                finding(
                    f"sphere, {name}: rms difference at {num:,} draws",
                    "of the closed form and the sum over a drawn bridge, nats",
                    f"falls as 1 / sqrt(draws); measured before at 1,000 / 10,000 / 100,000: {before}",
                    [row[column] for row in errors[name]],
                    JUDGED.get((name, num)),
                ),
                finding(
                    f"sphere, {name}: that over the error of {num:,} draws",
                    "ratio; the error of a drawn sum follows from the variance of its terms, which has a closed form",
                    "about 1: nothing but the draw sets the two apart",
                    [row[column] / known[column] for row, known in zip(errors[name], of_draw, strict=True)],
                    at_most(WORST_RATIO) if num >= ENOUGH else None,
                ),
                finding(
                    f"sphere, {name}: Spearman of the sum and <a, c> at {num:,} draws",
                    "rank correlation over the targets",
                    "reported; measured before: .85-.97 / at least .97 / at least .998",
                    [row[column] for row in of_sums],
                ),
            ]
    outcome.curves.append(
        curve(
            "sphere",
            "Lemma 2: difference of the closed form and a drawn sum",
            ("draws of the bridge", SAMPLES),
            "rms, nats",
            errors,
            log_x=True,
            log_y=True,
        )
    )


def _normals(setting: Setting, outcome: Outcome) -> None:
    for variance in NORMAL_VARIANCES:
        largest: list[float] = []
        for seed in setting.seeds:
            setting.check()
            rng = np.random.default_rng(seed)
            points = torch.from_numpy(rng.uniform(-REACH, REACH, size=(1 + NUM_TARGETS, NORMAL_DIM)))
            a, c = points[:1], points[1:]
            bridge = closed_forms.Normal(
                torch.zeros(NORMAL_DIM).double(),
                torch.eye(NORMAL_DIM).double(),
                torch.full((NORMAL_DIM,), variance).double(),
            )
            exact = closed_forms.gaussian(a, c, (1.0, 1.0), bridge, normalise=False)
            b = torch.from_numpy(rng.normal(scale=variance**0.5, size=(NORMAL_SAMPLES, NORMAL_DIM)))
            legs = (critics.scores("squared_distance", *pair) for pair in ((a, b), (b, c)))
            drawn = estimators.marginal(*legs, normalise=False).log_ratio
            largest.append(float((drawn - exact).abs().max()))
            setting.step()
        outcome.findings.append(
            finding(
                f"normal bridge, variance {variance:g}: largest difference",
                f"of the closed form and the sum over {NORMAL_SAMPLES:,} draws, nats",
                "0 but for the draw (lemma 3); measured before: .0077 at 1.5",
                largest,
                at_most(0.05),
            )
        )


def error_of_draw(
    a: Float64[Tensor, "one dim"], c: Float64[Tensor, "target dim"], scales: tuple[float, float], num: int
) -> float:
    """Return the root mean square over the targets of a sum's error, nats: sqrt(E w^2 / (E w)^2 - 1) / sqrt(num).

    w = exp(s1 <a, b> + s2 <b, c>), so that E w^2 is Lemma 2 at twice the scales.
    """
    twice = closed_forms.sphere(a, c, (2 * scales[0], 2 * scales[1]), normalise=False)
    once = closed_forms.sphere(a, c, scales, normalise=False)
    return float(((twice - 2 * once).expm1() / num).mean().sqrt())


def _around(
    dim: int, rng: np.random.Generator
) -> tuple[Float64[Tensor, "one dim"], Float64[Tensor, "target dim"], Float64[Tensor, "one target"]]:
    """Return a unit vector, unit vectors at given inner products with it, and these."""
    a = bridges.even(1, dim, rng)
    aside = bridges.even(NUM_TARGETS, dim, rng)
    aside = torch.nn.functional.normalize(aside - (aside @ a.T) * a, dim=1)
    cosines = torch.linspace(-1, 1, NUM_TARGETS, dtype=torch.float64)
    return a, cosines[:, None] * a + (1 - cosines**2).sqrt()[:, None] * aside, cosines[None]
