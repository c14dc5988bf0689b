"""The report of an experiment for people, as one page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from worker.pages import drawing, elements

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.contract.experiments import Bar, ExperimentReport, Finding, Verdict
    from worker.pages.elements import Html, Tone

_MEANING: Final[Mapping[Verdict, str]] = {
    "holds": "every bar was reached",
    "fails": "a bar was missed",
    "reported": "nothing was asserted",
}
_TONES: Final[Mapping[str, Tone]] = {"holds": "good", "fails": "bad", "reported": "note"}
_INTERVALS: Final = (
    "Measured: the mean over the seeds. 95 %: the interval of that mean, by Student's t. In plots lines are means and "
    "bands the range over the seeds. report.json holds every number."
)


def page(report: ExperimentReport, plots: Mapping[str, bytes]) -> str:
    """Write the page; `plots` are images by the name of their curve or map."""
    asserted = [each for each in report.findings if each.bar is not None]
    others = [each for each in report.findings if each.bar is None]
    titles = {each.name: each.title for each in (*report.curves, *report.maps)}
    drawn = [elements.plot(drawing.address(image), titles[name], large=True) for name, image in plots.items()]
    made: dict[str, tuple[str, list[Html]]] = {
        "set-up": ("Set-up", [elements.bullets(report.set_up)]),
        "judged": ("What the claim is judged by", [_table(asserted)] if asserted else []),
        "plots": ("Plots", [elements.plots(drawn)] if drawn else []),
        "besides": ("What was measured besides", [_table(others)] if others else []),
        "notes": ("Notes", [elements.bullets([*report.notes, _INTERVALS])]),
    }
    return elements.page(
        f"{report.experiment}: {report.verdict}",
        _lead(report),
        {name: (title, elements.section(name, title, *content)) for name, (title, content) in made.items() if content},
    )


def _lead(report: ExperimentReport) -> Html:
    quick = " (a quick run: bars are shown and not asserted)" if report.quick else ""
    return elements.join(
        elements.paragraph(report.claim),
        elements.paragraph(f"{report.paper}; {report.place}", note=True),
        elements.paragraph(
            f"{report.verdict}: {_MEANING[report.verdict]}{quick}. Seeds {', '.join(map(str, report.seeds))}; "
            f"{report.seconds:.0f} s, {report.cpu_seconds:.0f} s of CPU; Isthmus {report.code_version}, "
            f"torch {report.torch}."
        ),
    )


def _table(findings: Sequence[Finding]) -> Html:
    columns = ("figure", "what it is", "expected", "measured", "95 %", "by seed", "bar", "verdict")
    return elements.table(dict.fromkeys(columns), [_row(each) for each in findings], tones=_TONES)


def _row(each: Finding) -> list[str]:
    return [
        each.name,
        each.definition,
        each.expected,
        number(each.mean),
        "" if each.interval is None else f"{number(each.interval[0])} to {number(each.interval[1])}",
        ", ".join(number(value) for value in each.per_seed),
        "" if each.bar is None else written(each.bar),
        each.verdict,
    ]


def written(bar: Bar) -> str:
    """Write a bar in words."""
    return f"{bar.relation} {bar.bound:g}, {bar.over}"


def number(value: float) -> str:
    """Write a figure to four digits."""
    return f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}".rstrip("0").rstrip(".")
