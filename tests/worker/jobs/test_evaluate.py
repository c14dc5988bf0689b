from __future__ import annotations

from typing import Any

import pytest

from service.contract.errors import Cancelled, Permanent
from service.contract.jobs import EvaluateArgs
from worker.jobs import evaluate, evaluate_zero_shot
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
    report, _ = run(trained, "job_allowed", split="all", allow_training_data=True, max_samples=100, parts=["zero_shot"])
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
    report, _ = run(
        trained,
        "job_other",
        datasets=["ds_imu", "ds_other"],
        split="all",
        allow_training_data=True,
        parts=["retrieval"],
    )
    assert not report.datasets["ds_other"].learned_from
    assert {(entry.source, entry.target) for entry in report.retrieval if entry.dataset is None} == {
        ("codes", "imu"),
        ("imu", "codes"),
        ("codes", "text"),
        ("text", "codes"),
    }


def test_every_part_says_something_of_every_modality_or_why_not(
    trained: Any, measured: tuple[Report, dict[str, float]]
) -> None:
    report, summary = measured
    assert report.left_out == []
    classified = {("imu", "ds_imu"), ("text", "ds_imu"), ("codes", "ds_codes"), ("text", "ds_codes")}
    for entries in (report.prompt_curve, report.certificate, report.calibration, report.linear_probe):
        assert {(entry.modality, entry.dataset) for entry in entries} == classified
    for entries in (report.geometry, report.margins, report.completeness):
        assert [(entry.first, entry.second, entry.trained) for entry in entries] == [
            ("imu", "text", True),
            ("codes", "text", True),
        ]
    for entry in report.certificate:
        assert [each.r for each in entry.certificates] == [1, 5]  # of 8 labels, all are among the first 10
        assert all(each.error.value <= each.bound.value for each in entry.certificates)
    zero_shot = {(entry.modality, entry.dataset): entry for entry in report.zero_shot}
    for entry in report.prompt_curve:
        all_prompts = entry.points[-1]
        whole = zero_shot[entry.modality, entry.dataset]
        assert [point.num_prompts for point in entry.points] == [1, 2, 5, 10, 20, 40]
        assert all_prompts.cross_entropy.value == pytest.approx(whole.cross_entropy)
        assert 1 - all_prompts.error.value == pytest.approx(whole.accuracy)
        assert whole.top is not None
        assert whole.top[1].value == whole.accuracy
        assert whole.top[10].value == 1
    assert min(entry.probe.accuracy.value for entry in report.linear_probe) > 0.7
    for entry in report.margins:
        scales = trained.store.manifest(trained.inputs["model_a"]["artifact"]).body["logit_scales"]
        assert entry.margins.scale == pytest.approx(scales[f"{entry.first}+{entry.second}"])
        assert (entry.margins.classes, entry.margins.batch_size, entry.margins.num_batches) == ("label", 64, 1)
        assert entry.margins.positive_score.value > 0.3
    assert summary["modality_gap/imu+text"] == report.geometry[0].geometry.gap.value
    entry = report.retrieval[0]
    assert entry.recall_standard_error is not None
    assert 0 < entry.recall_standard_error[1] < 0.06  # sqrt(.25 / 80)


def test_the_page_is_beside_the_json(trained: Any, measured: tuple[Report, dict[str, float]]) -> None:
    html = trained.store.read("reports/job_measure/1", "report.html").decode()
    assert html.startswith("<!DOCTYPE html>")
    assert "Evaluation of model_a" in html
    assert "<script" not in html
    said = [event["detail"] for event in trained.said("job_measure", "event")]
    assert [detail["part"] for detail in said] == [
        "retrieval",
        "zero_shot",
        "linear_probe",
        "geometry",
        "margins",
        "completeness",
        "composition",
    ]
    counted = trained.said("job_measure", "progress")
    assert [each["done"] for each in counted] == sorted(each["done"] for each in counted)
    assert counted[-1]["done"] <= counted[-1]["total"] == 4 * (80 + 320 + 320)  # evaluated, prompts, probes


def test_the_same_seed_gives_the_same_report(trained: Any) -> None:
    parts = ["prompt_curve", "calibration", "margins", "completeness", "geometry"]
    again = [run(trained, f"job_again{at}", datasets=["ds_codes"], parts=parts, seed=5)[0] for at in range(2)]
    assert again[0] == again[1]
    assert again[0].retrieval == []
    assert again[0].zero_shot == []
    assert again[0].linear_probe == []


def test_blocks_change_nothing(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["zero_shot", "prompt_curve", "calibration", "certificate"]
    whole, _ = run(trained, "job_whole", datasets=["ds_codes"], parts=parts)
    monkeypatch.setattr(evaluate_zero_shot, "SCORES_AT_ONCE", 2000)
    cut, _ = run(trained, "job_cut", datasets=["ds_codes"], parts=parts)
    assert cut.zero_shot[0].cross_entropy == pytest.approx(whole.zero_shot[0].cross_entropy, rel=1e-6)
    assert cut.calibration[0].calibration.temperature == pytest.approx(
        whole.calibration[0].calibration.temperature, rel=1e-4
    )
    for one, other in zip(cut.prompt_curve[0].points, whole.prompt_curve[0].points, strict=True):
        assert one.cross_entropy.value == pytest.approx(other.cross_entropy.value, rel=1e-6)
    monkeypatch.setattr(evaluate_zero_shot, "KEPT_LOGITS", 8 * 20)
    few, _ = run(trained, "job_few", datasets=["ds_codes"], parts=["calibration"])
    assert few.calibration[0].calibration.num_samples == 20


def unlabelled(trained: Any, name: str, label: str) -> None:
    from service.contract.samples import Samples

    samples = Samples(trained.store.local(trained.inputs["ds_imu"]["artifact"]))
    rows = [
        (samples.key(at), {name: samples.payload(name, at) for name in ("imu", "text")}, label, at % 5 == 0)
        for at in range(100)
    ]
    trained.publish(name, {"imu": "continuous", "text": "text"}, rows)


@pytest.mark.parametrize("label", ["", "<b>one</b>"])
def test_what_the_data_cannot_give_has_its_reason(trained: Any, label: str) -> None:
    name = "ds_bare" if not label else "ds_alone"
    unlabelled(trained, name, label)
    report, _ = run(trained, f"job_{name}", datasets=[name])
    missing = {"zero_shot", "prompt_curve", "certificate", "calibration", "linear_probe", "completeness"}
    assert {each.part for each in report.left_out} == missing
    assert all(each.dataset == name for each in report.left_out)
    assert len(report.retrieval) == 2
    (entry,) = report.margins
    assert entry.margins.classes == "payload"
    with pytest.raises(Permanent, match=r"parts: completeness cannot be measured: fewer than two labels") as failure:
        run(trained, f"job_{name}_asked", datasets=[name], parts=["margins", "completeness"])
    assert failure.value.code == "nothing_to_measure"
    assert not trained.store.exists(f"reports/job_{name}_asked/1")


def test_too_few_prompts_for_a_curve_have_their_reason(trained: Any) -> None:
    report, _ = run(trained, "job_two", datasets=["ds_imu"], max_prompts=2, parts=["zero_shot"])
    assert report.zero_shot[0].num_prompts == 16
    with pytest.raises(Permanent, match=r"label 'five' has 2 prompts"):
        run(trained, "job_curve", datasets=["ds_imu"], max_prompts=2, parts=["prompt_curve"])


@pytest.mark.parametrize(("kind", "critic"), [("info_nce", "squared_distance"), ("sigmoid", "dot")])
def test_every_critic_is_measured_as_it_compares(bench: Any, recipe: Any, kind: str, critic: str) -> None:
    """Vectors without unit length: ranks, softmaxes and margins take the critic, only the geometry takes directions."""
    from service.contract.jobs import TrainArgs
    from worker.jobs import train

    made = recipe(loss={"kind": kind, "critic": critic}, budget={"steps": 40, "batch_size": 32, "checkpoint_s": 3600})
    bench.add_model(train.run(TrainArgs(recipe=made), bench.context("job_train")).artifact)
    report, _ = run(bench, "job_critic")
    assert report.critic == critic
    assert report.left_out == []
    for entry in report.completeness:
        assert entry.completeness.of_bound != 1
        assert -2 <= entry.completeness.gammas["0.0"].value <= 2
    for entry in report.geometry:
        assert 0 <= entry.geometry.alignment.value <= 4
    for entry in report.certificate:
        assert all(each.error.value <= each.bound.value for each in entry.certificates)
    assert all(1 / 80 < entry.recall[10] <= 1 for entry in report.retrieval)


def test_an_evaluation_can_be_cancelled_between_parts(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context = trained.context("job_between")
    said: list[str] = []

    def event(kind: str, detail: dict[str, Any]) -> None:
        said.append(detail["part"])
        if detail["part"] == "margins":
            context.ask("cancel")

    monkeypatch.setattr(context, "event", event)
    with pytest.raises(Cancelled):
        evaluate.run(EvaluateArgs(model="model_a", datasets=["ds_imu"]), context)
    assert said[-1] == "margins"
    assert not trained.store.exists("reports/job_between/1")


def test_a_cancelled_evaluation_publishes_nothing(trained: Any) -> None:
    context = trained.context("job_stop")
    context.ask("cancel")
    with pytest.raises(Cancelled):
        evaluate.run(EvaluateArgs(model="model_a", datasets=BOTH), context)
    assert not trained.store.exists("reports/job_stop/1")
