"""The report as one HTML page that needs nothing else: no script, no font, no other file."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from service.contract.experiments import Bar, ExperimentReport, Finding

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #0f172a; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #e2e8f0; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.holds { color: #15803d; } .fails { color: #b91c1c; font-weight: 600; } .reported { color: #64748b; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; } img { max-width: 100%; }
.aside { color: #475569; }
"""
_MEANING: Final = {
    "holds": "every bar was reached",
    "fails": "a bar was missed",
    "reported": "nothing was asserted",
}


def page(report: ExperimentReport, plots: dict[str, bytes]) -> str:
    """Write the page; `plots` are PNGs by the name of their curve or map."""
    asserted = [each for each in report.findings if each.bar is not None]
    others = [each for each in report.findings if each.bar is None]
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(report.experiment)}: {report.verdict}</title><style>{_STYLE}</style></head><body>\n",
            f"<h1>{escape(report.experiment)}: ",
            f'<span class="{report.verdict}">{report.verdict}</span></h1>\n',
            f"<p><strong>{escape(report.claim)}</strong><br>",
            f'<span class="aside">{escape(report.paper)}; {escape(report.place)}</span></p>\n',
            f"<p>{_MEANING[report.verdict]}",
            " (a quick run: bars are shown and not asserted)" if report.quick else "",
            f". Seeds {escape(', '.join(map(str, report.seeds)))}; {report.seconds:.0f} s, ",
            f"{report.cpu_seconds:.0f} s of CPU; ",
            f"Isthmus {escape(report.code_version)}, torch {escape(report.torch)}.</p>\n",
            "<h2>Set-up</h2>\n<ul>",
            *(f"<li>{escape(line)}</li>" for line in report.set_up),
            "</ul>\n",
            *(_section("What the claim is judged by", asserted) if asserted else ()),
            "<h2>Plots</h2>\n" if plots else "",
            *(_figure(report, name, content) for name, content in plots.items()),
            *(_section("What was measured besides", others) if others else ()),
            "<h2>Notes</h2>\n<ul>",
            *(f"<li>{escape(line)}</li>" for line in report.notes),
            (
                "<li>Intervals: 95 % for the mean over seeds, Student's t. Lines are means, bands the range over the "
                "seeds. report.json holds every number.</li></ul>\n</body></html>\n"
            ),
        ]
    )


def _figure(report: ExperimentReport, name: str, content: bytes) -> str:
    title = next(each.title for each in (*report.curves, *report.maps) if each.name == name)
    data = base64.b64encode(content).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>\n'


def _section(title: str, findings: list[Finding]) -> list[str]:
    return [
        f"<h2>{escape(title)}</h2>\n<table><tr>",
        "<th>figure<th>expected<th>measured<th>95 %<th>by seed<th>bar<th>verdict</tr>\n",
        *(_row(each) for each in findings),
        "</table>\n",
    ]


def _row(each: Finding) -> str:
    spread = "" if each.interval is None else f"{number(each.interval[0])} to {number(each.interval[1])}"
    return (
        f'<tr><td>{escape(each.name)}<br><span class="aside">{escape(each.definition)}</span>'
        f"<td>{escape(each.expected)}"
        f'<td class="number">{number(each.mean)}<td class="number">{spread}'
        f"<td>{', '.join(number(value) for value in each.per_seed)}"
        f"<td>{escape(written(each.bar)) if each.bar is not None else ''}"
        f'<td class="{each.verdict}">{each.verdict}</tr>\n'
    )


def written(bar: Bar) -> str:
    """Write a bar in words."""
    return f"{bar.relation} {bar.bound:g}, {bar.over}"


def number(value: float) -> str:
    """Write a figure to four digits."""
    return f"{value:.4g}" if abs(value) < 1e-3 else f"{value:.4f}".rstrip("0").rstrip(".")
