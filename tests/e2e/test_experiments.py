from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.cli import main
from service.contract.experiments import EXPERIMENTS, PAPERS, ExperimentReport, Paper

LONGEST_CPU_S = 3000  # of a paper: 25 minutes of two cores


def test_an_experiment_is_a_job_whose_report_is_downloaded(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(tmp_path / "data") as running:
        body = {"kind": "experiment", "experiment": "completeness", "seeds": 1, "quick": True}
        job = running.wait(running.post("/v1/jobs", body)["id"])
        assert job["result"]["verdict"] == "reported"
        assert job["result"]["summary"]["oracle: alpha"] == 0
        assert job["progress"]["unit"] == "runs"
        files = {each["id"]: each for each in running.get(f"/v1/jobs/{job['id']}/files")["data"]}
        assert {"report.json", "report.html"} <= set(files)
        report = ExperimentReport.model_validate(running.get(f"/v1/jobs/{job['id']}/files/report.json"))
        assert report.experiment == "completeness"
        page: httpx.Response = running.http.get(f"/v1/jobs/{job['id']}/files/report.html")
        assert page.text.startswith("<!DOCTYPE html>")

        out = tmp_path / "reports"
        arguments = ["certificate", "--seeds", "1", "--quick", "--url", running.url, "--out", str(out)]
        assert main(["experiments", "run", *arguments]) == 0
        assert "least distance of bound and error" in capsys.readouterr().out
        assert json.loads((out / "certificate" / "report.json").read_text())["quick"] is True
        assert list((out / "certificate").glob("*.png"))

        body |= {"experiment": "one-sided", "quick": False}
        job = running.post("/v1/jobs", body)["id"]
        running.wait(job, status="running")
        running.post(f"/v1/jobs/{job}/cancel", {})
        running.wait(job, status="cancelled", timeout_s=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("paper", PAPERS)
def test_every_bar_of_the_paper_is_reached(paper: Paper, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reports"
    code = main(["experiments", "run", "--all", "--paper", paper, "--out", str(out)])
    said = capsys.readouterr().out
    assert code == 0, said
    reports = [ExperimentReport.model_validate_json(path.read_bytes()) for path in out.glob("*/report.json")]
    assert {each.experiment: each.verdict for each in reports} == {
        name: "holds" for name, each in EXPERIMENTS.items() if each.paper == paper
    }
    assert sum(each.cpu_seconds for each in reports) < LONGEST_CPU_S
