"""From what each seed measured to a verdict. Pure, so that a verdict can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from service.contract.experiments import Bar, Curve, Finding, Map, Verdict

# Student's t, 97.5 %, by degrees of freedom from 1 on.
_T: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@final
@dataclass(frozen=True)
class Setting:
    """How an experiment is to be run."""

    seeds: tuple[int, ...]
    quick: bool
    step: Callable[[], None]
    """Called after every run, of which there are as many as the experiment says; may raise to stop it."""
    check: Callable[[], None]
    """Called often; may raise to stop it."""

    def steps(self, num: int) -> int:
        """Return the steps of a training: a tenth of them in a quick run."""
        return max(10, num // 10) if self.quick else num


@final
@dataclass
class Outcome:
    """What an experiment found."""

    set_up: list[str]
    findings: list[Finding] = field(default_factory=list[Finding])
    curves: list[Curve] = field(default_factory=list[Curve])
    maps: list[Map] = field(default_factory=list[Map])
    notes: list[str] = field(default_factory=list[str])


def finding(name: str, definition: str, expected: str, per_seed: Sequence[float], bar: Bar | None = None) -> Finding:
    """Judge a figure by its bar, if it has one."""
    values = [float(value) for value in per_seed]
    return Finding(
        name=name,
        definition=definition,
        expected=expected,
        per_seed=values,
        mean=math.fsum(values) / len(values),
        interval=interval(values),
        bar=bar,
        verdict="reported" if bar is None else "holds" if meets(bar, values) else "fails",
    )


def at_most(bound: float, *, mean: bool = False) -> Bar:
    """Return an upper bar, for every seed or for the mean."""
    return Bar(relation="at most", bound=bound, over="mean" if mean else "every seed")


def at_least(bound: float, *, mean: bool = False) -> Bar:
    """Return a lower bar, for every seed or for the mean."""
    return Bar(relation="at least", bound=bound, over="mean" if mean else "every seed")


def meets(bar: Bar, per_seed: Sequence[float]) -> bool:
    """Tell whether a figure reaches its bar; one that is no number never does."""
    judged = [math.fsum(per_seed) / len(per_seed)] if bar.over == "mean" else list(per_seed)
    if bar.relation == "at most":
        return all(value <= bar.bound for value in judged)
    return all(value >= bar.bound for value in judged)


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """Return `fails` if any bar is missed, `reported` if nothing is asserted, else `holds`."""
    verdicts = {each.verdict for each in findings}
    if "fails" in verdicts:
        return "fails"
    return "holds" if "holds" in verdicts else "reported"


def unasserted(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings of too little work to be judged: their bars stand, their verdicts do not."""
    return [each.model_copy(update={"verdict": "reported"}) for each in findings]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over independent seeds, by Student's t; None for a single one."""
    num = len(values)
    if num < 2:
        return None
    mean = math.fsum(values) / num
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (num - 1))
    t = _T[num - 2] if num - 2 < len(_T) else 1.96 + 2.4 / (num - 1)
    half = t * deviation / math.sqrt(num)
    return mean - half, mean + half


def curve(
    name: str,
    title: str,
    x: tuple[str, Sequence[float]],
    y_label: str,
    series: dict[str, list[list[float]]],
    *,
    log_x: bool = False,
    log_y: bool = False,
    marks: dict[str, float] | None = None,
) -> Curve:
    """Return a curve; `x` is its label and values, a series is name -> by seed -> by x."""
    return Curve(
        name=name,
        title=title,
        x_label=x[0],
        y_label=y_label,
        x=list(x[1]),
        log_x=log_x,
        log_y=log_y,
        series=series,
        marks=marks or {},
    )
