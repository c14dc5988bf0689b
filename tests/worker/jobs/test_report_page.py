from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.evaluation import completeness, geometry, margins
from worker.evaluation.calibration import measure as calibrate
from worker.evaluation.certificate import certify
from worker.evaluation.ensembles import Fit, Point
from worker.evaluation.estimates import Estimate
from worker.jobs import report_page
from worker.jobs.report import Calibrated, Certified, LeftOut, PromptCurve, Report, ZeroShot

NASTY = """</table><script>alert('$1')</script><img src="https://example.org/x">"""
OLD: dict[str, Any] = {
    "format": 1,
    "model": "model_a",
    "model_digest": "0" * 64,
    "split": "holdout",
    "seed": 0,
    "datasets": {"ds_a": {"digest": "1" * 64, "num_samples": 3, "learned_from": True}},
    "retrieval": [
        {
            "source": "image",
            "target": "text",
            "trained": True,
            "dataset": "ds_a",
            "relevant": "partner",
            "method": "direct",
            "num_queries": 3,
            "num_targets": 3,
            "recall": {"1": 0.5, "5": 1.0},
            "precision": {"1": 0.5, "5": 0.3},
            "chance_recall": {"1": 0.3, "5": 1.0},
            "chance_precision": {"1": 0.3, "5": 0.3},
        }
    ],
    "zero_shot": [
        {
            "modality": "image",
            "dataset": "ds_a",
            "prompts_modality": "text",
            "prompts": "given",
            "prompts_overlap": False,
            "num_prompts": 4,
            "num_labels": 2,
            "num_samples": 3,
            "num_left_out": 0,
            "accuracy": 0.5,
            "chance": 0.5,
            "cross_entropy": 0.7,
        }
    ],
}


class Page(HTMLParser):
    """Every tag, where it leads, and whether each is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.leads: list[str] = []
        self.images: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.leads += [given["href"] or ""] if "href" in given else []
        self.images += [given["src"] or ""] if "src" in given else []
        assert not [name for name in given if name.startswith("on")]
        if tag not in {"meta", "img"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(report: Report, folder: Path) -> Page:
    html = report_page.render(report, folder)
    page = Page(html)
    assert "url(" not in html, "no style fetches anything either"
    assert "@import" not in html
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    assert all(image.startswith("data:image/svg+xml;base64,") for image in page.images)
    assert len(page.ids) == len(set(page.ids))
    assert {lead.removeprefix("#") for lead in page.leads} <= set(page.ids)
    assert all(lead.startswith("#") for lead in page.leads)
    return page


def full(num_pairs: int = 1) -> Report:
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(64, 8, generator=generator), dim=1)
    scores, classes = z @ z.T, torch.arange(64) % 4
    found = margins.measure([(scores, classes[:, None] != classes)] * 3, ("a", "b"), "label", 10.0, 15)
    gap, by_chance = geometry.gap(z, z)
    shape = {
        "num_samples": 64,
        "alignment": geometry.alignment(z, z),
        "uniformity": {"a": geometry.uniformity(z), "b": geometry.uniformity(z)},
        "gap": gap,
        "gap_by_chance": by_chance,
        "separable": geometry.separable(z, z),
    }
    half = Estimate(value=0.5, standard_error=0.1)
    fit = Fit(a=half, b=half, r_squared=0.99, num_prompts=[1, 2, 5])
    of = {"dataset": "ds_a", "modality": "image", "prompts_modality": "text"}
    pair = {"dataset": "ds_a", "first": "a", "second": "b", "trained": True}
    pairs = {
        "geometry": {**pair, "geometry": shape},
        "margins": {**pair, "margins": found},
        "completeness": {**pair, "completeness": completeness.measure(scores, classes, 1.0, 0)},
    }
    certificates = certify(torch.tensor([0.1, 2.0]), {1: torch.tensor([0.0, 1.0]), 5: torch.tensor([0.0, 0.0])})
    probed = {
        "num_train": 10,
        "num_labels": 4,
        "num_samples": 64,
        "num_left_out": 0,
        "accuracy": half,
        "chance": 0.25,
        "cross_entropy": half,
        "inverse_penalty": 1.0,
        "converged": False,
    }
    curve = PromptCurve.model_validate(
        {
            **of,
            "num_labels": 1000,
            "num_samples": 64,
            "num_draws": 10,
            "prior": "uniform",
            "points": [Point(num_prompts=num, cross_entropy=half, error=half) for num in (1, 2, 5)],
            "cross_entropy_fit": fit,
            "error_fit": None,
        }
    )
    return Report.model_validate(
        {
            **OLD,
            "format": 2,
            "zero_shot": [
                ZeroShot.model_validate({**OLD["zero_shot"][0], "top": {1: half, 5: half}, "num_labels": 1000})
            ],
            "prompt_curve": [curve],
            "certificate": [Certified.model_validate({**of, "num_samples": 2, "certificates": certificates})],
            "calibration": [
                Calibrated.model_validate({**of, "calibration": calibrate(scores[:, :4].double(), classes, 15, 0)})
            ],
            "linear_probe": [{"dataset": "ds_a", "modality": "image", "probe": probed}],
            **{name: [entry] * num_pairs for name, entry in pairs.items()},
            "left_out": [LeftOut(part="margins", dataset=None, of="", reason=f"label {NASTY!r} has 2 prompts")],
        }
    )


def test_all_parts_make_one_page_without_script_and_every_title_leads_somewhere(tmp_path: Path) -> None:
    page = read(full(), tmp_path)
    assert page.tags.count("h1") == 1
    assert page.tags.count("section") == page.tags.count("h2") == 11
    assert page.leads[:11] == [
        f"#{name}"
        for name in (
            "retrieval",
            "zero_shot",
            "prompt_curve",
            "certificate",
            "calibration",
            "linear_probe",
            "geometry",
            "margins",
            "completeness",
            "left_out",
            "errors",
        )
    ]
    assert len(page.images) == 2 + 1 + 1 + 2 + 1


def test_what_users_named_stays_text(tmp_path: Path) -> None:
    page = read(full(), tmp_path)
    assert "<script>alert(" in page.words


def test_a_thousand_pairs_make_a_page_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "MAX_PLOTS", 2)
    report = full(1000)
    page = read(report, tmp_path)
    assert len(page.images) == 2 + 1 + 1 + 2 * 2 + 2
    assert "998 more plots were left out" in page.words
    assert "800 more rows are in report.json" in page.words
    assert len(report_page.render(report, tmp_path)) < 600_000


def test_a_report_of_the_first_format_is_still_read_and_shown(tmp_path: Path) -> None:
    report = Report.model_validate(OLD)
    assert Report.model_validate_json(report.model_dump_json()) == report
    page = read(report, tmp_path)
    assert page.tags.count("section") == 3
    assert "0.5" in page.words
    assert not page.images


def test_a_report_survives_its_json_and_its_schema_names_every_part() -> None:
    report = full()
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert {"retrieval", "zero_shot", "margins", "left_out", "definitions"} <= set(
        Report.model_json_schema()["properties"]
    )
    assert report.summary()["hardest_margin/a->b"] == report.margins[0].margins.directions[0].hardest.value
