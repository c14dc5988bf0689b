"""The composition part of the report for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from worker.pages import elements

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from worker.evaluation.estimates import Estimate
    from worker.jobs.report import PairComposition
    from worker.pages.elements import Html

_WAY: Final[dict[str, str | None]] = {"from": None, "to": None, "over": None}


def tables(entries: Sequence[PairComposition], write: Callable[[Estimate | None], str]) -> list[Html]:
    """Return which method to use, then the figures of each assumption; `write` writes an estimate."""
    if not entries:
        return []
    found = [_methods(entries), _offsets(entries), _shapes(entries)]
    if any(entry.calibration for entry in entries):
        found.append(_calibration(entries, write))
    if any(entry.independence for entry in entries):
        found.append(_independence(entries, write))
    return found


def _way(entry: PairComposition) -> list[str]:
    return [entry.source, entry.target, entry.through]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _methods(entries: Sequence[PairComposition]) -> Html:
    columns = {
        **_WAY,
        "bridge items": "bridge_size of composition",
        "effective samples": "effective_sample_size",
        "rank correlation": "rank_correlation",
        "same best": "best_agreement",
        "use": "method",
        "because": "method",
    }
    rows = [
        [
            *_way(entry),
            str(known.bridge_size),
            f"{_number(known.sum.effective_sample_size)} ({known.sum.sample_size_verdict})",
            f"{_number(known.sum.rank_correlation)} ({known.sum.agreement_verdict})",
            _number(known.sum.best_agreement),
            known.method,
            known.reason,
        ]
        for entry in entries
        for known in [entry.diagnostics]
    ]
    return elements.table(columns, rows)


def _offsets(entries: Sequence[PairComposition]) -> Html:
    columns = {
        **_WAY,
        "leg": None,
        "scale": "scale",
        "deviation of log Z": "end_offset_deviation",
        "over the bridge": "bridge_offset_deviation",
        "verdict": "verdict",
    }
    rows = [
        [
            *_way(entry),
            f"{leg.end} with {entry.through}",
            _number(leg.scale),
            _number(leg.end_offset_deviation),
            _number(leg.bridge_offset_deviation),
            leg.verdict,
        ]
        for entry in entries
        for leg in (entry.diagnostics.first, entry.diagnostics.second)
    ]
    return elements.table(columns, rows)


def _shapes(entries: Sequence[PairComposition]) -> Html:
    columns = {
        **_WAY,
        "mean direction": "resultant",
        "largest axis": "largest_axis",
        "Rayleigh (p)": "rayleigh",
        "Bingham (p)": "bingham",
        "projections (p)": "projection_distance",
        "log potential": "log_potential",
        "if even": "log_potential_if_even",
        "elongation": "elongation",
        "excess kurtosis": "excess_kurtosis",
        "verdict": "verdict",
    }
    rows: list[list[str]] = []
    for entry in entries:
        ball, cloud = entry.diagnostics.sphere, entry.diagnostics.normal
        directions = [""] * 7
        if ball is not None:
            directions = [
                _number(ball.resultant),
                _number(ball.largest_axis),
                f"{_number(ball.rayleigh)} ({_number(ball.rayleigh_p)})",
                f"{_number(ball.bingham)} ({_number(ball.bingham_p)})",
                f"{_number(ball.projection_distance)} ({_number(ball.projection_p)})",
                _number(ball.log_potential),
                _number(ball.log_potential_if_even),
            ]
        shape = ["", ""] if cloud is None else [_number(cloud.elongation), _number(cloud.excess_kurtosis)]
        verdict = ", ".join(each.verdict for each in (ball, cloud) if each is not None)
        rows.append([*_way(entry), *directions, *shape, verdict])
    return elements.table(columns, rows)


def _calibration(entries: Sequence[PairComposition], write: Callable[[Estimate | None], str]) -> Html:
    columns = {
        "leg": None,
        "data set": None,
        "samples": None,
        "of": "num_ways",
        "calibration error": "expected_calibration_error",
        "temperature": "temperature",
        "verdict": "verdict",
    }
    legs = {
        (leg.source, leg.target, leg.dataset): [
            f"{leg.source} to {leg.target}",
            leg.dataset,
            str(leg.calibration.num_samples),
            str(leg.num_ways),
            write(leg.calibration.expected_calibration_error),
            _number(leg.calibration.temperature),
            leg.verdict,
        ]
        for entry in entries
        for leg in entry.calibration
    }
    return elements.table(columns, list(legs.values()))


def _independence(entries: Sequence[PairComposition], write: Callable[[Estimate | None], str]) -> Html:
    columns = {
        **_WAY,
        "data set": None,
        "triples": None,
        "information beside the bridge": "conditional_information",
        "verdict": "verdict",
    }
    rows = [
        [*_way(entry), each.dataset, str(each.num_triples), write(each.conditional_information), each.verdict]
        for entry in entries
        for each in entry.independence
    ]
    return elements.table(columns, rows)
