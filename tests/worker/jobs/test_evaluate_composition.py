"""The composition part, on a model that learned imu and codes through text, and on samples that hold all three."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.contract.errors import Permanent
from service.contract.jobs import EvaluateArgs
from worker.composition.choice import choose
from worker.jobs import evaluate, report_page
from worker.jobs.evaluate_composition import judge
from worker.jobs.report import Report

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def run(trained: Any, job: str, **changes: Any) -> tuple[Report, dict[str, float]]:
    args = {"model": "model_a", "datasets": ["ds_imu", "ds_codes"], "parts": ["composition"]} | changes
    result = evaluate.run(EvaluateArgs.model_validate(args), trained.context(job))
    return Report.model_validate_json(trained.store.read(result.artifact, "report.json")), result.summary


@pytest.fixture(scope="module")
def measured(trained: Any) -> tuple[Report, dict[str, float]]:
    return run(trained, "job_composition")


def test_each_direction_of_the_pair_that_was_never_trained_is_looked_at(
    measured: tuple[Report, dict[str, float]],
) -> None:
    report, summary = measured
    assert [(entry.source, entry.target, entry.through) for entry in report.composition] == [
        ("codes", "imu", "text"),
        ("imu", "codes", "text"),
    ]
    for entry in report.composition:
        known = entry.diagnostics
        assert (known.first.end, known.second.end) == (entry.source, entry.target)
        assert known.sphere is not None
        method, reason = choose(
            report.critic,
            comparable=True,
            resultant=known.sphere.resultant,
            sample_size=known.sum.effective_sample_size,
            rank_agreement=known.sum.rank_correlation,
        )
        assert (method, reason) == (known.method, known.reason)
        way = f"{entry.source}->{entry.target}/text"
        assert summary[f"composition_effective_sample_size/{way}"] == known.sum.effective_sample_size
        assert entry.independence == []  # nobody saw all three
    assert report.left_out == []
    assert report.retrieval == []


def test_both_legs_are_calibrated_on_held_out_pairs(measured: tuple[Report, dict[str, float]]) -> None:
    report, _ = measured
    legs = [(leg.source, leg.target, leg.dataset) for leg in report.composition[0].calibration]
    assert legs == [("codes", "text", "ds_codes"), ("text", "imu", "ds_imu")]
    for entry in report.composition:
        for leg in entry.calibration:
            assert 2 <= leg.num_ways <= 32
            assert leg.calibration.num_samples % leg.num_ways == 0
            error = leg.calibration.expected_calibration_error.value
            assert 0 <= error <= 1
            assert leg.verdict == judge(error)


def test_the_page_names_the_method_and_its_reason(measured: tuple[Report, dict[str, float]], tmp_path: Any) -> None:
    report, _ = measured
    html = report_page.render(report, tmp_path)
    assert 'id="composition"' in html
    assert report.composition[0].diagnostics.reason.partition("(")[0].strip() in html


def test_the_same_seed_looks_at_the_same_items(trained: Any, measured: tuple[Report, dict[str, float]]) -> None:
    report, _ = run(trained, "job_composition_again")
    assert report.composition == measured[0].composition


def test_a_model_without_banks_has_its_reason(bench: Any, recipe: Any) -> None:
    from service.contract.jobs import TrainArgs
    from worker.jobs import train

    made = recipe(bank={"keep": "none"}, budget={"steps": 2, "batch_size": 32, "checkpoint_s": 3600})
    bench.add_model(train.run(TrainArgs(recipe=made), bench.context("job_train")).artifact)
    with pytest.raises(Permanent, match="does not keep its banks"):
        run(bench, "job_none")


def test_verdicts_of_calibration() -> None:
    assert [judge(error) for error in (0.01, 0.1, 0.3)] == ["passes", "doubtful", "fails"]


def test_samples_that_hold_all_three_show_what_goes_past_the_bridge(trained: Any) -> None:
    """Texts that name the class explain all that imu and codes share; texts that name any class explain nothing."""
    bench = replace(trained, inputs=dict(trained.inputs))
    rng = np.random.default_rng(11)
    centres = np.random.default_rng(7).normal(size=(len(WORDS), 3)) * 4 + 10  # those of `ds_imu`
    for name in ("ds_named", "ds_past"):
        rows: list[tuple[str, dict[str, bytes], str, bool]] = []
        for at in range(400):
            label = at % len(WORDS)
            said = label if name == "ds_named" else int(rng.integers(len(WORDS)))
            payloads = {
                "imu": npy((centres[label] + rng.normal(size=(6, 3))).astype(np.float32)),
                "codes": npy((3 * label + rng.integers(0, 3, size=4)).astype(np.int32)),
                "text": f"a {WORDS[said]}".encode(),
            }
            rows.append((f"{name}{at}", payloads, WORDS[label], True))
        bench.publish(name, {"imu": "continuous", "codes": "discrete", "text": "text"}, rows)
    report, summary = run(bench, "job_triples", datasets=["ds_named", "ds_past"])
    for entry in report.composition:
        named, past = entry.independence
        assert (named.dataset, past.dataset, named.num_triples, past.num_triples) == ("ds_named", "ds_past", 200, 200)
        assert named.verdict == "passes"
        assert past.verdict == "fails"
        assert past.num_directions > 0
        mean = (named.conditional_information.value + past.conditional_information.value) / 2
        assert summary[f"conditional_information/{entry.source}->{entry.target}/text"] == pytest.approx(mean)


def test_few_samples_of_all_three_have_their_reason(trained: Any) -> None:
    bench = replace(trained, inputs=dict(trained.inputs))
    payloads = {"imu": npy(np.ones((4, 3), np.float32)), "codes": npy(np.ones(3, np.int32)), "text": b"a one"}
    rows = [(f"s{at}", payloads, "one", True) for at in range(20)]
    bench.publish("ds_few", {"imu": "continuous", "codes": "discrete", "text": "text"}, rows)
    report, _ = run(bench, "job_few_triples", datasets=["ds_few"])
    assert all(entry.calibration == entry.independence == [] for entry in report.composition)
    reasons = {each.reason for each in report.left_out}
    assert any("20 samples hold all three" in each for each in reasons)
    assert any("calibration cannot be told" in each for each in reasons)
