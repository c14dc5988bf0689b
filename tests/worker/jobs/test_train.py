from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.contract.errors import Cancelled, Interrupted, Permanent
from service.contract.jobs import TrainArgs, TrainResult
from service.contract.recipe import Recipe
from worker.jobs import train
from worker.learning.model import load_model
from worker.runner import Context

MakeRecipe = Callable[..., Recipe]
BUDGET = {"steps": 12, "batch_size": 16, "checkpoint_s": 0, "keep_checkpoints": 50, "log_every": 5}


@pytest.fixture
def small(recipe: MakeRecipe) -> Recipe:
    """Twelve steps with dropout (so that generators matter), a checkpoint after each."""
    document = recipe(budget=BUDGET, bank={"size": 32}).model_dump(mode="json")
    for tower in document["towers"].values():
        tower["dropout"] = 0.1
    return Recipe.model_validate(document)


def weights(bench: Any, result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(bench.store.local(result.artifact) / "model.safetensors")


def ask_at(context: Context, monkeypatch: pytest.MonkeyPatch, num_checks: int, what: Any) -> None:
    """Have somebody ask the job to stop once it has looked that often."""
    plain, seen = context.check, 0

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen == num_checks:
            context.ask(what)
        plain()

    monkeypatch.setattr(context, "check", check)


def test_a_run_ends_in_a_model_with_all_that_its_manifest_promises(trained: Any) -> None:
    key = trained.inputs["model_a"]["artifact"]
    assert key == "models/model_trained/1"
    manifest = trained.store.manifest(key)
    trained.store.verify(key)
    assert manifest.kind == "model"
    assert set(manifest.files) == {"recipe.json", "model.safetensors", "tokenizers/text.json", "bank.safetensors"}
    body = manifest.body
    assert body["step"] == 240
    assert body["pairs"] == [["codes", "text"], ["imu", "text"]]
    assert body["data"]["ds_imu"] == {
        "digest": trained.inputs["ds_imu"]["digest"],
        "split": "train",
        "modalities": ["imu", "text"],
    }
    assert body["banks"]["imu+text"] == {"size": 512, "items": True}
    assert Recipe.model_validate(body["recipe"]).seed == 3
    assert len(load_model(trained.store.local(key), "cpu").banks) == 2


def test_the_loss_falls_and_is_told_with_rate_scale_and_speed(trained: Any) -> None:
    told = trained.said("job_trained", "metric")
    assert [metric["step"] for metric in told] == [60, 120, 180, 240, 240]
    expected = {"loss/imu+text", "loss/codes+text", "scale/imu+text", "learning_rate", "grad_norm", "steps_per_s"}
    assert expected <= told[0]["values"].keys()
    for pair in ("imu+text", "codes+text"):
        assert told[3]["values"][f"loss/{pair}"] < told[0]["values"][f"loss/{pair}"] - 0.2
    assert trained.said("job_trained", "progress")[-1] == {"done": 240, "total": 240, "eta_s": 0.0}


@pytest.mark.parametrize("step", [1, 4, 11])
def test_a_run_killed_at_any_step_and_resumed_has_the_same_weights_bit_for_bit(
    step: int, small: Recipe, bench: Any
) -> None:
    whole = train.run(TrainArgs(recipe=small), bench.context("job_r"))
    for later in range(step + 1, 12):
        bench.store.delete(f"checkpoints/job_r/{later}-1")
    resumed = train.run(
        TrainArgs(recipe=small), bench.context("job_r", epoch=2, resume=[f"checkpoints/job_r/{step}-1"])
    )
    first, second = weights(bench, whole), weights(bench, resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.artifact == "models/model_r/2"
    detail = {"step": step, "artifact": f"checkpoints/job_r/{step}-1", "same_environment": True}
    assert {"type": "resumed", "detail": detail} in bench.said("job_r", "event", epoch=2)
    banks = [load_model(bench.store.local(result.artifact), "cpu").banks for result in (whole, resumed)]
    assert torch.equal(banks[0]["imu+text"].vectors["imu"], banks[1]["imu+text"].vectors["imu"])


@pytest.mark.parametrize("step", [1, 7])
def test_resuming_keeps_the_schedule_of_the_pairs_and_the_learned_vocabulary(
    step: int, small: Recipe, bench: Any
) -> None:
    document = small.model_dump(mode="json")
    document["pairs"][0]["weight"] = 2.5
    document["towers"]["text"]["tokens"] |= {"method": "bpe", "vocab": 280}
    uneven = Recipe.model_validate(document)
    whole = train.run(TrainArgs(recipe=uneven), bench.context("job_p"))
    again = train.run(TrainArgs(recipe=uneven), bench.context("job_q"))
    for later in range(step + 1, 12):
        bench.store.delete(f"checkpoints/job_p/{later}-1")
    resumed = train.run(
        TrainArgs(recipe=uneven), bench.context("job_p", epoch=2, resume=[f"checkpoints/job_p/{step}-1"])
    )
    vocabularies = [bench.store.read(one.artifact, "tokenizers/text.json") for one in (whole, again, resumed)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    assert json.loads(vocabularies[0])["model"]["merges"]
    first, *others = (weights(bench, one) for one in (whole, again, resumed))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    position = bench.store.read("checkpoints/job_p/11-2", "state/position.json")
    assert json.loads(position)["drawn"] == [8, 3]


def test_interrupted_again_and_again_it_still_ends_with_the_same_weights(
    small: Recipe, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint but those that an interruption writes."""
    document = small.model_dump(mode="json")
    document["budget"] |= {"checkpoint_s": 3600}
    patient = Recipe.model_validate(document)
    whole = train.run(TrainArgs(recipe=patient), bench.context("job_w"))
    resume: list[str] = []
    for epoch, after in enumerate(
        (4, 1, 6), start=1
    ):  # the second is asked before it takes a single step: it saves none
        context = bench.context("job_i", epoch=epoch, resume=resume)
        ask_at(context, monkeypatch, after, "interrupt")
        with pytest.raises(Interrupted):
            train.run(TrainArgs(recipe=patient), context)
        resume = [saved["artifact"] for saved in bench.said("job_i", "checkpoint", epoch=epoch)] + resume
    assert resume == ["checkpoints/job_i/8-3", "checkpoints/job_i/3-1"]
    resumed = train.run(TrainArgs(recipe=patient), bench.context("job_i", epoch=4, resume=resume))
    first, second = weights(bench, whole), weights(bench, resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_interruption_while_the_bank_is_drawn_loses_no_step(
    small: Recipe, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = bench.context("job_b")
    ask_at(context, monkeypatch, 13, "interrupt")
    with pytest.raises(Interrupted):
        train.run(TrainArgs(recipe=small), context)
    *_, last = bench.said("job_b", "checkpoint")
    assert last["step"] == 12
    resumed = train.run(TrainArgs(recipe=small), bench.context("job_b", epoch=2, resume=[last["artifact"]]))
    assert resumed.metrics["loss/imu+text"] == last["metrics"]["loss/imu+text"]


def test_a_cancelled_run_stops_before_its_next_step(small: Recipe, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context = bench.context("job_x")
    ask_at(context, monkeypatch, 4, "cancel")
    with pytest.raises(Cancelled):
        train.run(TrainArgs(recipe=small), context)
    assert [saved["step"] for saved in bench.said("job_x", "checkpoint")] == [1, 2, 3]
    assert bench.store.list("models") == []


def test_a_loss_that_is_no_number_fails_the_job_with_its_step_and_pair(small: Recipe, bench: Any) -> None:
    document = small.model_dump(mode="json")
    document["optimiser"] |= {"learning_rate": 10.0, "weight_decay": 10.0, "warmup_steps": 0}  # weights grow 99-fold
    document["budget"] |= {"steps": 200, "keep_checkpoints": 2}
    with pytest.raises(Permanent, match=r"step \d+, pair (imu|codes)\+text: the loss is .*nan|inf") as failure:
        train.run(TrainArgs(recipe=Recipe.model_validate(document)), bench.context("job_n"))
    assert failure.value.code == "not_finite"
    saved = load_model(bench.store.local(bench.said("job_n", "checkpoint")[-1]["artifact"]), "cpu")
    assert all(bool(torch.isfinite(value).all()) for value in saved.model.state_dict().values())


def test_a_seed_decides_everything(small: Recipe, bench: Any) -> None:
    first = weights(bench, train.run(TrainArgs(recipe=small), bench.context("job_s")))
    again = weights(bench, train.run(TrainArgs(recipe=small), bench.context("job_t")))
    other = train.run(TrainArgs(recipe=small.model_copy(update={"seed": 9})), bench.context("job_u"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tower_imu.readout.weight"], weights(bench, other)["tower_imu.readout.weight"])


def test_data_that_do_not_fit_the_recipe_fail_before_the_first_step(small: Recipe, bench: Any) -> None:
    document = small.model_dump(mode="json")
    document["budget"] |= {"batch_size": 400}
    with pytest.raises(Permanent, match="fewer than batch_size 400"):
        train.run(TrainArgs(recipe=Recipe.model_validate(document)), bench.context("job_f"))
    assert bench.said("job_f", "checkpoint") == []


def learned(bench: Any, recipe: Recipe, job: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Train a recipe with other compute; the weights."""
    document = recipe.model_dump(mode="json") | changes
    return weights(bench, train.run(TrainArgs(recipe=Recipe.model_validate(document)), bench.context(job)))


def test_micro_batches_learn_the_same_to_rounding(recipe: MakeRecipe, bench: Any) -> None:
    made = recipe(budget=BUDGET, bank={"size": 32})
    whole = learned(bench, made, "job_w")
    for micro_batch in (5, 16):
        parts = learned(bench, made, f"job_m{micro_batch}", compute={"micro_batch": micro_batch})
        for name, value in whole.items():
            if "qkv.bias" not in name:  # a key's bias has no gradient but rounding, which Adam blows up
                torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())  # 16 is all of it


@pytest.fixture
def varied(small: Recipe) -> Recipe:
    """Augmented, in micro-batches with dropout, by a loader process."""
    document = small.model_dump(mode="json")
    for tower in document["towers"].values():
        tower["augment"] = {"kind": "tokens", "drop": 0.3}
    document["compute"] = {"micro_batch": 6, "loaders": 1}
    return Recipe.model_validate(document)


def test_an_augmented_run_in_micro_batches_by_loaders_resumes_bit_for_bit(varied: Recipe, bench: Any) -> None:
    whole = learned(bench, varied, "job_v")
    assert {"type": "loaders", "detail": {"processes": 1}} in bench.said("job_v", "event")
    for later in range(8, 12):
        bench.store.delete(f"checkpoints/job_v/{later}-1")
    context = bench.context("job_v", epoch=2, resume=["checkpoints/job_v/7-1"])
    resumed = weights(bench, train.run(TrainArgs(recipe=varied), context))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    by_a_thread = learned(bench, varied, "job_u", compute={"micro_batch": 6, "loaders": 0})
    assert all(torch.equal(value, by_a_thread[name]) for name, value in whole.items())
    plain = varied.model_dump(mode="json")["towers"]
    for tower in plain.values():
        tower["augment"] = None
    other = learned(bench, varied, "job_y", towers=plain)
    assert not all(torch.equal(value, other[name]) for name, value in whole.items())


def test_banks_and_measured_values_know_no_augmentation(varied: Recipe, small: Recipe, bench: Any) -> None:
    found = learned(bench, varied, "job_v")
    plain = learned(bench, small, "job_s")
    for buffer in ("mean", "deviation"):
        assert torch.equal(found[f"tower_imu.{buffer}"], plain[f"tower_imu.{buffer}"])
    banks = [load_model(bench.store.local(f"models/model_{job}/1"), "cpu").banks for job in ("v", "s")]
    first, second = (bank["imu+text"].items["imu"] for bank in banks)
    assert torch.equal(first.values, second.values)


def test_what_a_run_tells_of_its_pace(trained: Any) -> None:
    told = trained.said("job_trained", "metric")[0]["values"]
    assert told["samples_per_s"] == pytest.approx(32 * told["steps_per_s"])
    assert 0 <= told["wait_share"] < 1
    assert 0 < told["padded_share"] < 0.5  # of 4 to 8 vectors and 3 to 6 ids


@pytest.mark.gpu
def test_on_a_gpu_it_learns_resumes_and_is_served_on_the_cpu(recipe: MakeRecipe, bench: Any) -> None:
    """In bf16. Weights are not promised bit for bit there, vectors are close."""
    made = recipe(budget={"steps": 240, "batch_size": 32, "checkpoint_s": 0, "keep_checkpoints": 100, "log_every": 60})
    whole = train.run(TrainArgs(recipe=made), bench.context("job_g", device="cuda"))
    context = bench.context("job_g", epoch=2, resume=["checkpoints/job_g/200-1"], device="cuda")
    resumed = train.run(TrainArgs(recipe=made), context)
    assert whole.metrics["holdout_recall@1/imu->text"] > 0.3
    models = [load_model(bench.store.local(result.artifact), "cpu") for result in (whole, resumed)]
    items = models[0].banks["imu+text"].items["imu"].to("cpu")
    z, again = (one.model.encode("imu", items) for one in models)
    assert float((z * again).sum(1).min()) > 0.9
    stored = models[0].banks["imu+text"].vectors["imu"]
    assert float((z * stored).sum(1).min()) > 0.99
