from __future__ import annotations

import json
import os
import re
from html import escape
from typing import TYPE_CHECKING, get_args

import pytest

from service.contract.errors import Cancelled
from service.contract.experiments import EXPERIMENTS, PAPERS, Bar, ExperimentName, ExperimentReport
from service.contract.jobs import ExperimentArgs
from worker.jobs import experiment
from worker.theory import (
    assumption_a1,
    batch_size,
    bridges,
    closed_forms,
    concentration,
    discrete_exact,
    estimator_honesty,
    gaussian_table,
    mazes,
    mazes_policies,
    measures,
    one_sided,
    separate_models,
    square_loss,
    temperature_margin,
)
from worker.theory import completeness as theory_completeness
from worker.theory import experiments as theory

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worker.conftest import Bench

NAMES: tuple[ExperimentName, ...] = get_args(ExperimentName)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experiments that do next to nothing, in the same places."""
    monkeypatch.setattr(measures, "PROMPT_SETS", 1)
    monkeypatch.setattr(measures, "ITEMS", 40)
    monkeypatch.setattr(measures, "MARGIN_BATCHES", 2)
    monkeypatch.setattr(theory_completeness, "NUM_TESTED", 100)
    for module in (square_loss, temperature_margin, theory_completeness):
        monkeypatch.setattr(module, "STEPS", 100)
    monkeypatch.setattr(batch_size, "STEPS", 20)
    monkeypatch.setattr(batch_size, "FACTOR_SIZES", (2, 20, 40, 320))
    monkeypatch.setattr(mazes, "STEPS", 100)
    monkeypatch.setattr(mazes, "NUM_WALKS", 100)
    monkeypatch.setattr(mazes, "MAX_STEPS", 5)
    monkeypatch.setattr(mazes, "BRIDGE", 50)
    monkeypatch.setattr(mazes_policies, "BATCH_SIZE", 16)
    monkeypatch.setattr(closed_forms, "SAMPLES", (100, 10_000))
    monkeypatch.setattr(closed_forms, "NORMAL_SAMPLES", 1000)
    monkeypatch.setattr(discrete_exact, "STEPS", 100)
    monkeypatch.setattr(discrete_exact, "NUM_PAIRS", 500)
    monkeypatch.setattr(bridges, "SEARCHED", 500)
    monkeypatch.setattr(concentration, "TRUTH", 30_000)
    monkeypatch.setattr(assumption_a1, "NUM_TRIPLES", 96)
    monkeypatch.setattr(assumption_a1, "NUM_DIAGNOSED", 64)
    monkeypatch.setattr(estimator_honesty, "NUM_QUERIES", 20)
    monkeypatch.setattr(estimator_honesty, "POOLS", 1)
    monkeypatch.setattr(separate_models, "STEPS", 50)  # whose sizes dropped-scale takes too
    monkeypatch.setattr(gaussian_table, "STEPS", 50)
    monkeypatch.setattr(gaussian_table, "POOLS", (100, 200))
    for module in (separate_models, gaussian_table):
        monkeypatch.setattr(module, "NUM_PAIRS", 300)
    monkeypatch.setattr(separate_models, "BRIDGE", 200)
    assert one_sided.STEPS > 100  # its own is for its words alone: it trains as temperature-margin does


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_writes_a_report_a_page_and_plots(name: ExperimentName, bench: Bench) -> None:
    context = bench.context("job_e")
    result = experiment.run(ExperimentArgs(experiment=name, seeds=2, seed=5, quick=True), context)
    assert result.verdict == "reported"
    folder = bench.store.local(result.artifact)
    report = ExperimentReport.model_validate_json((folder / "report.json").read_bytes())
    assert report.experiment == name
    assert report.seeds == [5, 6]
    assert report.claim == EXPERIMENTS[name].claim
    assert report.paper == PAPERS[EXPERIMENTS[name].paper]
    assert report.set_up
    assert report.notes
    assert any(each.bar is not None for each in report.findings), "every claim is judged by something"
    assert all(len(each.per_seed) == 2 and each.verdict == "reported" for each in report.findings)
    assert len({each.name for each in report.findings}) == len(report.findings)
    assert result.summary == {each.name: each.mean for each in report.findings}
    assert all(len(row) == len(curve.x) for curve in report.curves for rows in curve.series.values() for row in rows)
    progress = bench.said("job_e", "progress")
    assert progress[-1]["done"] == progress[-1]["total"] == theory.num_runs(name, 2)

    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    drawn = [*report.curves, *report.maps]
    assert files == {"report.json", "report.html"} | {f"{each.name}.png" for each in drawn}
    assert all((folder / f"{each.name}.png").read_bytes().startswith(b"\x89PNG") for each in drawn)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(escape(each.name) in page and escape(each.definition) in page for each in report.findings)
    assert page.count("<img") == len(drawn)
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page), "a page needs no other file"
    assert "<script" not in page


@pytest.mark.usefixtures("tiny")
def test_the_same_seed_measures_the_same(bench: Bench) -> None:
    args = ExperimentArgs(experiment="certificate", seeds=1, quick=True)
    first, again = (experiment.run(args, bench.context(job)) for job in ("job_a", "job_b"))
    assert first.summary == again.summary
    other = experiment.run(args.model_copy(update={"seed": 1}), bench.context("job_c"))
    assert other.summary != first.summary


@pytest.mark.usefixtures("tiny")
def test_a_missed_bar_is_a_verdict_and_not_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory_completeness, "at_most", lambda _: Bar(relation="at least", bound=1.0))
    result = experiment.run(ExperimentArgs(experiment="completeness", seeds=1), bench.context("job_e"))
    assert result.verdict == "fails"
    assert json.loads((bench.store.local(result.artifact) / "report.json").read_text())["verdict"] == "fails"


@pytest.mark.usefixtures("tiny")
def test_an_experiment_stops_between_its_runs(bench: Bench) -> None:
    context = bench.context("job_e")
    context.ask("cancel")
    with pytest.raises(Cancelled):
        experiment.run(ExperimentArgs(experiment="square-loss", seeds=1, quick=True), context)


@pytest.mark.usefixtures("tiny")
def test_plots_leave_nothing_at_home(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    context = bench.context("job_e")
    experiment.run(ExperimentArgs(experiment="certificate", seeds=1, quick=True), context)
    assert os.environ["MPLCONFIGDIR"].startswith(str(context.scratch))
