from __future__ import annotations

from typing import Any

import pytest

from service.contract.errors import Cancelled, Permanent
from service.contract.jobs import EvaluateArgs
from worker.jobs import evaluate
from worker.jobs.report import Report

BOTH = ["ds_imu", "ds_codes"]


def run(trained: Any, job: str, **changes: Any) -> tuple[Report, dict[str, float]]:
    args = EvaluateArgs.model_validate({"model": "model_a", "datasets": BOTH} | changes)
    result = evaluate.run(args, trained.context(job))
    assert result.artifact == f"reports/{job}/1"
    return Report.model_validate_json(trained.store.read(result.artifact, "report.json")), result.summary


@pytest.fixture(scope="module")
def measured(trained: Any) -> tuple[Report, dict[str, float]]:
    return run(trained, "job_measure")


def test_a_pair_that_was_never_trained_is_found_far_above_chance(measured: tuple[Report, dict[str, float]]) -> None:
    """No data set holds imu and codes: a free modality met another one only through text."""
    report, summary = measured
    untrained = [entry for entry in report.retrieval if {entry.source, entry.target} == {"imu", "codes"}]
    assert [(entry.source, entry.target, entry.method, entry.through) for entry in untrained] == [
        ("codes", "imu", "direct", None),
        ("codes", "imu", "marginal", "text"),
        ("imu", "codes", "direct", None),
        ("imu", "codes", "marginal", "text"),
    ]
    for entry in untrained:
        assert not entry.trained
        assert entry.relevant == "label"
        assert (entry.num_queries, entry.num_targets) == (80, 80)
        assert entry.chance_precision[10] == pytest.approx(1 / 8, abs=0.01)
        assert entry.chance_recall[1] == pytest.approx(1 / 8, abs=0.01)
        assert entry.precision[10] > (0.75 if entry.method == "marginal" else 0.45)  # by chance 0.125
        assert entry.recall[1] > 0.6
        if entry.method == "marginal":
            assert entry.bridge_size == 1024
            assert entry.effective_sample_size is not None
            assert 1 <= entry.effective_sample_size <= 1024
            assert entry.trusted_fraction is not None
    assert summary["precision@10/imu->codes/marginal"] > 0.6


def test_trained_pairs_find_their_partner_both_ways(measured: tuple[Report, dict[str, float]]) -> None:
    report, summary = measured
    trained_pairs = [entry for entry in report.retrieval if entry.trained]
    assert {(entry.source, entry.target, entry.dataset) for entry in trained_pairs} == {
        ("imu", "text", "ds_imu"),
        ("text", "imu", "ds_imu"),
        ("codes", "text", "ds_codes"),
        ("text", "codes", "ds_codes"),
    }
    for entry in trained_pairs:
        assert entry.method == "direct"
        assert entry.relevant == "partner"
        assert entry.recall[10] > entry.recall[5] > entry.recall[1] > entry.chance_recall[1]
    assert summary["recall@1/imu->text/direct"] > 3 / 16


def test_every_labelled_modality_is_classified_without_having_learned_a_label(
    measured: tuple[Report, dict[str, float]],
) -> None:
    report, summary = measured
    found = {(entry.modality, entry.dataset): entry for entry in report.zero_shot}
    assert set(found) == {("imu", "ds_imu"), ("text", "ds_imu"), ("codes", "ds_codes"), ("text", "ds_codes")}
    imu = found["imu", "ds_imu"]
    assert imu.prompts_modality == "text"
    assert (imu.prompts, imu.prompts_overlap) == ("training", False)
    assert (imu.num_labels, imu.num_samples, imu.num_left_out, imu.num_prompts) == (8, 80, 0, 320)
    assert imu.accuracy > 0.8
    assert imu.cross_entropy < 1.0
    assert found["codes", "ds_codes"].accuracy > 0.6
    assert summary["zero_shot_accuracy/imu"] == imu.accuracy


def test_a_report_says_what_its_numbers_mean_and_where_they_come_from(
    trained: Any, measured: tuple[Report, dict[str, float]]
) -> None:
    report, _ = measured
    assert {"recall", "precision", "chance", "marginal", "accuracy"} <= report.definitions.keys()
    assert report.model_digest == trained.inputs["model_a"]["digest"]
    assert report.datasets["ds_imu"].learned_from
    assert report.datasets["ds_imu"].num_samples == 80
    assert report.split == "holdout"


def test_training_data_are_refused_unless_allowed(trained: Any) -> None:
    with pytest.raises(Permanent, match="the model learned from data set ds_imu") as failure:
        run(trained, "job_refused", split="train")
    assert failure.value.code == "training_data"
    report, _ = run(trained, "job_allowed", split="all", allow_training_data=True, max_samples=100)
    assert report.zero_shot[0].prompts_overlap
    assert report.datasets["ds_codes"].num_samples == 100


def test_given_prompts_are_used_and_samples_without_one_left_out(trained: Any) -> None:
    prompts = {"zero": ["a zero", "the zero"], "five": ["the five"], "eleven": ["an eleven"]}
    report, _ = run(trained, "job_prompts", datasets=["ds_imu"], prompts=prompts, ks=[3])
    (entry,) = [entry for entry in report.zero_shot if entry.modality == "imu"]
    assert (entry.prompts, entry.num_prompts, entry.num_labels) == ("given", 4, 3)
    assert (entry.num_samples, entry.num_left_out) == (20, 60)
    assert entry.accuracy > 0.8
    assert list(report.retrieval[0].recall) == [3]
    with pytest.raises(Permanent, match="prompts of 'long'"):
        run(trained, "job_long", prompts={"long": ["word " * 100], "zero": ["a zero"]})


def test_data_that_nobody_learned_from_may_be_evaluated_whole(trained: Any) -> None:
    codes = trained.store.local(trained.inputs["ds_codes"]["artifact"])
    from service.contract.samples import Samples

    samples = Samples(codes)
    rows = [
        (samples.key(at), {"codes": samples.payload("codes", at)}, samples.label(at), False) for at in range(0, 400, 5)
    ]
    trained.publish("ds_other", {"codes": "discrete"}, rows)
    with pytest.raises(Permanent, match="ds_other has no samples in split 'holdout'"):
        run(trained, "job_empty", datasets=["ds_other"])
    report, _ = run(trained, "job_other", datasets=["ds_imu", "ds_other"], split="all", allow_training_data=True)
    assert not report.datasets["ds_other"].learned_from
    assert {(entry.source, entry.target) for entry in report.retrieval if entry.dataset is None} == {
        ("codes", "imu"),
        ("imu", "codes"),
        ("codes", "text"),
        ("text", "codes"),
    }


def test_a_cancelled_evaluation_publishes_nothing(trained: Any) -> None:
    context = trained.context("job_stop")
    context.ask("cancel")
    with pytest.raises(Cancelled):
        evaluate.run(EvaluateArgs(model="model_a", datasets=BOTH), context)
    assert not trained.store.exists("reports/job_stop/1")
