"""Every loss and critic, from training to what a report says of the model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from service.contract.jobs import EvaluateArgs, Part, TrainArgs, TrainResult
from worker.jobs import evaluate, train

LOSSES: dict[str, dict[str, Any]] = {
    "dot": {"kind": "info_nce", "critic": "dot"},
    "distance": {"kind": "info_nce", "critic": "squared_distance", "attract": 0.1},
    "attract": {"kind": "info_nce", "attract": 0.5, "learn_scale": False},
    "k_sample": {"kind": "k_sample", "candidates": 4},
    "k_sample_dot": {"kind": "k_sample", "critic": "dot"},
    "sigmoid": {"kind": "sigmoid", "init_bias": -3.0},
    "sigmoid_distance": {"kind": "sigmoid", "critic": "squared_distance", "init_bias": -3.0},
}
BUDGET = {"steps": 160, "batch_size": 40, "checkpoint_s": 3600, "log_every": 60}


def fit(bench: Any, recipe: Any, name: str, **changes: Any) -> TrainResult:
    result = train.run(
        TrainArgs(recipe=recipe(budget=BUDGET, bank={"size": 128}, **changes)), bench.context(f"job_{name}")
    )
    bench.add_model(result.artifact, f"model_{name}")
    return result


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_a_model_that_finds_partners_and_classifies(recipe: Any, bench: Any, name: str) -> None:
    config = LOSSES[name]
    result = fit(bench, recipe, name, loss=config)
    body = bench.store.manifest(result.artifact).body
    assert body["critic"] == result.critic == config.get("critic", "cosine")
    with_bias = {"codes+text", "imu+text"} if config["kind"] == "sigmoid" else set[str]()
    assert body["logit_biases"].keys() == result.logit_biases.keys() == with_bias
    assert {"bias/" + pair for pair in with_bias} == {each for each in result.metrics if each.startswith("bias/")}
    # 16 captions, of which a model can tell the word but not the article
    assert result.metrics["holdout_recall@1/imu->text"] > 0.25
    floor, loss = (result.metrics[f"{figure}/imu+text"] for figure in ("loss_floor", "loss"))
    assert result.metrics["loss_above_floor/imu+text"] == pytest.approx(loss - floor)
    parts: list[Part] | None = None if name == "sigmoid_distance" else ["retrieval", "zero_shot"]
    args = EvaluateArgs(model=f"model_{name}", datasets=["ds_imu", "ds_codes"], split="holdout", ks=[1], parts=parts)
    summary = evaluate.run(args, bench.context("job_evaluated")).summary
    assert summary
    assert all(math.isfinite(value) for value in summary.values())


def test_the_square_loss_fits_a_tower_to_one_that_is_locked(recipe: Any, bench: Any) -> None:
    fit(bench, recipe, "first", loss=LOSSES["distance"])
    document = recipe().model_dump(mode="json")
    document["towers"]["text"] |= {"init_from": {"model": "model_first"}, "locked": True}
    result = fit(bench, recipe, "fitted", towers=document["towers"], loss={"kind": "square"})
    assert result.critic == "squared_distance"
    assert not result.logit_biases
    assert result.metrics["holdout_recall@1/imu->text"] > 0.25
    assert not any(each.startswith("loss_floor/") for each in result.metrics)
