from __future__ import annotations

from service.contract.experiments import Curve, ExperimentReport
from worker.theory import page, plots
from worker.theory.findings import at_least, at_most, finding

CURVE = Curve(name="c", title="Over <x>", x_label="x", y_label="y", x=[1, 2], series={"s": [[1, 2]]}, marks={})


def report(*, quick: bool = False) -> ExperimentReport:
    return ExperimentReport(
        experiment="certificate",
        paper="A & B",
        place="section <1>",
        claim="x < y",
        set_up=["drawn <evenly>"],
        seeds=[3, 4],
        quick=quick,
        findings=[
            finding("missed", "share of <all>", "half", [0.1, 0.3], at_least(0.5)),
            finding("reached", "nats", "none", [0.00012345, 0.0], at_most(1.0, mean=True)),
            finding("besides", "seconds", "", [12.0, 14.0]),
        ],
        notes=["a note"],
        curves=[CURVE],
        maps=[],
        verdict="fails",
        seconds=3.2,
        cpu_seconds=4.6,
        code_version="1",
        torch="2",
    )


def test_every_figure_stands_beside_its_definition_its_bar_and_its_verdict() -> None:
    html = page.page(report(), {"c": plots.draw(CURVE)})
    assert "<h1>certificate: fails</h1>" in html
    assert (
        "<tr><td>missed</td><td>share of &lt;all&gt;</td><td>half</td><td>0.2</td><td>-1.0706 to 1.4706</td>"
        '<td>0.1, 0.3</td><td>at least 0.5, every seed</td><td class="bad">fails</td></tr>' in html
    )
    assert '<td>at most 1, mean</td><td class="good">holds</td>' in html
    judged, besides = html.split("What was measured besides</h2>")
    assert "<td>besides</td>" in besides
    assert "<td>besides</td>" not in judged
    assert "a bar was missed. Seeds 3, 4; 3 s, 5 s of CPU" in html
    assert "Over &lt;x&gt;" in html
    assert "(a quick run" not in html
    assert "(a quick run" in page.page(report(quick=True), {})


def test_what_there_is_none_of_has_no_section() -> None:
    bare = report().model_copy(update={"findings": report().findings[2:], "curves": []})
    html = page.page(bare, {})
    assert "What the claim is judged by" not in html
    assert "Plots" not in html


def test_figures_have_four_digits_and_small_ones_an_exponent() -> None:
    assert [page.number(value) for value in (0.5, 12.34567, 1e-12, 0.0, -3.0)] == ["0.5", "12.3457", "1e-12", "0", "-3"]
