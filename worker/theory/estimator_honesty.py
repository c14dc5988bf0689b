"""Does a composition say how wrong it is? Its effective sample size, error bar and bias, held to closed forms.

Normal triples have exact ratios, so that the error of a sum over a drawn bridge is the draw's alone, and known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch

from worker.composition import estimators
from worker.theory import gaussian
from worker.theory.findings import Outcome, Setting, at_least, at_most, curve, finding

NUM_QUERIES: Final = 200
POOLS: Final = 4  # bridges a seed: all queries share one, so their errors go together
HEALTHY: Final = 30.0
WORD: Final = {"8/4/8": (8, 4, 8), "16/8/16": (16, 8, 16), "32/16/32": (32, 16, 32)}


@final
@dataclass(frozen=True)
class Case:
    """Dimensions of a, b and c, noise, and how much of the bridge is drawn."""

    dims: str
    noise: float
    num_bridge: int
    before: str
    healthy: bool = False
    """Whether the median effective sample size is known to be above 30, so that the error bar can be held to."""
    hopeless: bool = False
    """Whether it is known to be near 1, so that the values must not be trusted."""

    @property
    def name(self) -> str:
        """How findings call it."""
        return f"{self.dims}, noise {self.noise:g}, {self.num_bridge:,} b"


CASES: Final = (
    Case("8/4/8", 2.0, 1_000, "205-223 / .94-.95 / .07 / -", healthy=True),
    Case("8/4/8", 2.0, 10_000, "- / .82 / .03 / -", healthy=True),
    Case("16/8/16", 2.0, 1_000, "3-4 / .60-.82 / 1-1.9 / -.3 to -.7"),
    Case("16/8/16", 2.0, 10_000, "14-20 / .81-.92 / .19-.37 / -.03 to -.13"),
    Case("16/8/16", 1.0, 10_000, "1-2 / .03-.53 / - / -2 to -8", hopeless=True),
    Case("32/16/32", 2.0, 10_000, "1.0 / 0 / - / -24 to -57", hopeless=True),
)


@final
@dataclass(frozen=True)
class Honesty:
    """Means over the pools; errors are those of the log-ratio of every a with every c, nats."""

    sample_size: float
    """Median over all a and c."""
    coverage: float
    """The share of errors within two of the standard errors that were given."""
    rmse: float
    bias: float
    true_pairs: float
    """Mean error of those that belong together."""
    foreseen: float
    """The mean of the bias that was given."""
    trusted: float
    """The share of the sources whose values were said to be usable."""


def measure(case: Case, seed: int, setting: Setting, *, normalise: bool) -> Honesty:
    """Compare sums over drawn bridges with the closed form."""
    law = gaussian.views(seed, WORD[case.dims], noise=case.noise)
    rng = np.random.default_rng(seed + 1)
    rows: list[list[float]] = []
    for _ in range(POOLS):
        setting.check()
        asked, bridge = law.draw(NUM_QUERIES, rng), law.draw(case.num_bridge, rng).b
        found = estimators.marginal(
            law.first_leg.scores(asked.a, bridge), law.second_leg.scores(bridge, asked.c), normalise=normalise
        )
        error = found.log_ratio - law.whole.scores(asked.a, asked.c)
        rows.append(
            [
                float(found.effective_sample_size.median()),
                float((error.abs() <= 2 * found.standard_error).double().mean()),
                float(error.square().mean().sqrt()),
                float(error.mean()),
                float(error.diagonal().mean()),
                float(found.bias.mean()),
                float(found.trusted.double().mean()),
            ]
        )
    return Honesty(*torch.tensor(rows, dtype=torch.float64).mean(0).tolist())


def num_runs(num_seeds: int) -> int:
    """Return how many steps of progress there are."""
    return num_seeds * len(CASES)


def run(setting: Setting) -> Outcome:
    """Measure every case, as a plain sum and with the offsets of both legs removed."""
    outcome = Outcome(
        set_up=[
            (
                "Normal triples with exact ratios (as in `separate-models`); "
                f"{NUM_QUERIES} a by {NUM_QUERIES} c, {POOLS} independent bridges a seed."
            ),
            (
                "The error is the estimated log-ratio minus its closed form; coverage is the share of errors within 2 "
                "standard errors, both as the service computes them."
            ),
            (
                "Plain: the logarithm of the sum. Normalised: less the logarithms of both legs' own sums, as a service "
                "answers for learned critics; for exact ones these are 0 but for the draw."
            ),
        ]
    )
    plain: dict[Case, list[Honesty]] = {case: [] for case in CASES}
    normalised: dict[Case, list[Honesty]] = {case: [] for case in CASES}
    for case in CASES:
        for seed in setting.seeds:
            plain[case].append(measure(case, seed, setting, normalise=False))
            normalised[case].append(measure(case, seed, setting, normalise=True))
            setting.step()
        _judge(outcome, case, plain[case], normalised[case])
    sizes = [float(np.mean([each.sample_size for each in plain[case]])) for case in CASES]
    order = sorted(range(len(CASES)), key=sizes.__getitem__)
    outcome.curves.append(
        curve(
            "coverage",
            "How often the truth is within two standard errors",
            ("median effective sample size (mean over seeds)", [float(f"{sizes[at]:.2g}") for at in order]),
            "share",
            {
                name: [[found[CASES[at]][row].coverage for at in order] for row in range(len(setting.seeds))]
                for name, found in (("plain", plain), ("normalised", normalised))
            },
            log_x=True,
        )
    )
    outcome.notes += [
        (
            "Where the median effective sample size is small, the items that carry the sum were hardly drawn: the "
            "value is too low, most for those that belong together, and the error bar cannot know it. Hence the values "
            "are not to be trusted there, and only their order is of use."
        ),
        "Errors of one bridge go together, so coverage of a single bridge is far from 95 % by luck alone.",
    ]
    return outcome


def _judge(outcome: Outcome, case: Case, plain: list[Honesty], normalised: list[Honesty]) -> None:
    before = f"measured before (size / coverage / rmse / bias): {case.before}"
    outcome.findings += [
        finding(
            f"{case.name}: median effective sample size",
            "over all a and c",
            before,
            [each.sample_size for each in plain],
            at_least(HEALTHY, mean=True) if case.healthy else at_most(10.0) if case.hopeless else None,
        ),
        finding(
            f"{case.name}: coverage",
            "share of errors within 2 standard errors",
            before,
            [each.coverage for each in plain],
            at_least(0.8, mean=True) if case.healthy else None,
        ),
        finding(
            f"{case.name}: root mean squared error",
            "nats",
            before,
            [each.rmse for each in plain],
            at_most(0.25) if case.healthy else None,
        ),
        finding(
            f"{case.name}: share of the sources whose values are trusted",
            "those with a median effective sample size of at least 10",
            "0" if case.hopeless else "1" if case.healthy else "reported",
            [each.trusted for each in plain],
            at_most(0.0) if case.hopeless else at_least(0.95) if case.healthy else None,
        ),
        finding(f"{case.name}: bias", "mean error, nats", before, [each.bias for each in plain]),
        finding(f"{case.name}: bias of true pairs", "nats", "below that of all", [each.true_pairs for each in plain]),
        finding(
            f"{case.name}: bias foreseen", "mean of the bias given, nats", "reported", [each.foreseen for each in plain]
        ),
        finding(
            f"{case.name}: coverage, normalised",
            "share of errors within 2 standard errors",
            "as plain",
            [each.coverage for each in normalised],
            at_least(0.8, mean=True) if case.healthy else None,
        ),
        finding(
            f"{case.name}: root mean squared error, normalised", "nats", "reported", [each.rmse for each in normalised]
        ),
    ]
