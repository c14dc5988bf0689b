from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from service.cli import main
from service.client import local
from service.client.experiments import _run, _show
from service.client.local import Work, run_here
from service.contract.experiments import EXPERIMENTS, Bar, ExperimentReport, Finding
from service.contract.jobs import ExperimentArgs

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_list_says_what_is_claimed_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiments", "list"]) == 0
    said = capsys.readouterr().out
    for each in EXPERIMENTS.values():
        assert each.name in said
        assert each.claim in said
    assert main(["experiments", "list", "--paper", "clip-transfer", "--json"]) == 0
    of_paper = [each.name for each in EXPERIMENTS.values() if each.paper == "clip-transfer"]
    assert [each["name"] for each in json.loads(capsys.readouterr().out)] == of_paper


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["cosine-loss"], "there is no experiment 'cosine-loss'; there are square-loss, certificate"),
        ([], "name experiments or say --all"),
        (["certificate", "--all"], "not both"),
        (["certificate", "--seeds", "1000"], "--seeds: "),
        (["certificate", "--seed", "-1"], "--seed: "),
        (["certificate", "--url", "ftp://x"], "is not an http:// or https:// URL"),
        (["certificate", "--url", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_what_cannot_be_run_is_said(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["experiments", "run", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert reason in capsys.readouterr().err


def test_experiments_run_on_a_bare_checkout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["completeness", "certificate", "--seeds", "1", "--quick", "--out", str(out)]
    assert main(["experiments", "run", *arguments]) == 0
    said = capfd.readouterr().out
    assert "EXPERIMENT" in said
    assert "oracle: beta" in said
    for name in ("completeness", "certificate"):
        report = ExperimentReport.model_validate_json((out / name / "report.json").read_bytes())
        assert report.verdict == "reported"
        assert (out / name / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert list((out / "certificate").glob("*.png"))
    assert said.index("\ncertificate: ") < said.index("\ncompleteness: "), "in the order of the list"


def test_an_interrupted_run_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "experiments", "run", "square-loss", "one-sided", "--at-once", "2"]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "out")],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stdout=said,
            stderr=said,
        )
        try:
            deadline = time.monotonic() + 60
            while len(runners := psutil.Process(process.pid).children(recursive=True)) < 2:
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()
    assert not [each for each in runners if each.is_running()]
    assert not list(tmp_path.glob("isthmus-experiments-*"))
    assert "stopped; nothing is left running" in (tmp_path / "said").read_text()


def test_a_runner_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = [Work("certificate", ExperimentArgs(experiment="certificate"))]
    monkeypatch.setattr(local, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(local.ApiError, match="needs no_such_package"):
        list(run_here(work, tmp_path, 1, lambda *_: None))


def test_a_runner_that_dies_shows_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    work = [Work("certificate", ExperimentArgs(experiment="certificate"))]
    with pytest.raises(local.ApiError, match=r"(?s)without a word; its last lines:\n.*worker\.runner"):
        list(run_here(work, tmp_path, 1, lambda *_: None))


def _finding(name: str, value: float, bar: Bar | None, verdict: str) -> Finding:
    return Finding.model_validate(
        {
            "name": name,
            "definition": "",
            "expected": "",
            "per_seed": [value],
            "mean": value,
            "interval": None,
            "bar": bar,
            "verdict": verdict,
        }
    )


def _report(verdict: str) -> ExperimentReport:
    bar = Bar(relation="at least", bound=0.3)
    return ExperimentReport.model_validate(
        {
            "experiment": "square-loss",
            "paper": "p",
            "place": "s",
            "claim": "A claim.",
            "set_up": [],
            "seeds": [0],
            "quick": False,
            "findings": [_finding("an error", 0.25, bar, verdict), _finding("another", 1.0, None, "reported")],
            "notes": [],
            "curves": [],
            "verdict": verdict,
            "seconds": 1,
            "cpu_seconds": 1,
            "code_version": "0",
            "torch": "0",
        }
    )


def test_a_missed_bar_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from service.arguments import parser
    from service.client import experiments

    options = parser().parse_args(["experiments", "run", "square-loss", "--out", str(tmp_path)])
    for verdict, code in (("fails", 1), ("holds", 0)):
        report = {"report.json": _report(verdict).model_dump_json().encode()}
        monkeypatch.setattr(experiments, "_here", lambda *_, files=report: iter([files]))
        assert _run(options, [EXPERIMENTS["square-loss"]], None) == code
    assert "square-loss: fails, 0 of 1 bars reached" in capsys.readouterr().out


def test_the_table_holds_what_a_claim_is_judged_by_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    _show([_report("fails")])
    said = capsys.readouterr().out
    assert "A claim." in said
    (line,) = [line for line in said.splitlines() if "an error" in line]
    assert line.split("  ")[-1] == "fails"
    assert "at least 0.3" in line
    assert "another" not in said
