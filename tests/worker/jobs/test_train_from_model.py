"""Training that starts from a model: what comes along, what learns, and what a resumed run needs of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.contract.errors import Permanent
from service.contract.jobs import TrainArgs, TrainResult
from service.contract.recipe import Recipe
from worker.jobs import train
from worker.learning.model import Loaded, load_model
from worker.learning.ragged import Ragged

MakeRecipe = Callable[..., Recipe]
BUDGET = {"steps": 10, "batch_size": 16, "checkpoint_s": 0, "keep_checkpoints": 50, "log_every": 5}


@pytest.fixture
def learned(bench: Any, recipe: MakeRecipe) -> Loaded:
    """A model that an earlier job trained, with merges in its vocabulary: `model_a` among the inputs."""
    document = recipe(budget=BUDGET | {"steps": 30}, bank={"size": 32}).model_dump(mode="json")
    document["towers"]["text"]["tokens"] |= {"method": "bpe", "vocab": 280}
    result = train.run(TrainArgs(recipe=Recipe.model_validate(document)), bench.context("job_before"))
    bench.add_model(result.artifact)
    return load_model(bench.store.local(result.artifact), "cpu")


@pytest.fixture
def second(recipe: MakeRecipe) -> Recipe:
    """Text is locked, codes learn by low-rank updates beside dropout, imu is new; another seed and space of 16."""
    document = recipe(budget=BUDGET, bank={"size": 32}, seed=11).model_dump(mode="json")
    towers = document["towers"]
    towers["text"]["tokens"] |= {"method": "bpe", "vocab": 280}
    towers["text"] |= {"init_from": {"model": "model_a"}, "locked": True, "dropout": 0.3}
    towers["codes"] |= {"init_from": {"model": "model_a"}, "lora": {"rank": 2}, "dropout": 0.1}
    return Recipe.model_validate(document)


def run(bench: Any, recipe: Recipe, job: str, **options: Any) -> TrainResult:
    return train.run(TrainArgs(recipe=recipe), bench.context(job, **options))


def weights(bench: Any, result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(bench.store.local(result.artifact) / "model.safetensors")


def test_a_locked_tower_gives_the_vectors_of_the_model_that_it_came_from(
    bench: Any, learned: Loaded, second: Recipe
) -> None:
    result = run(bench, second, "job_second")
    model = load_model(bench.store.local(result.artifact), "cpu")
    ids = Ragged(torch.randint(4, 270, (30,)), torch.tensor([5, 12, 13]))
    assert torch.equal(model.model.encode("text", ids), learned.model.encode("text", ids))
    before = learned.model.state_dict()
    after = weights(bench, result)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("tower_text."))
    assert not torch.equal(after["tower_codes.blocks.0.up.weight"], before["tower_codes.blocks.0.up.weight"])
    assert torch.equal(after["tower_codes.embedding.weight"], before["tower_codes.embedding.weight"])
    assert not any("lora" in name for name in after)
    files = [
        bench.store.read(key, "tokenizers/text.json") for key in (result.artifact, bench.inputs["model_a"]["artifact"])
    ]
    assert files[0] == files[1]
    assert json.loads(files[0])["model"]["merges"]


def test_a_manifest_says_where_towers_come_from_and_what_they_learned_from(
    bench: Any, learned: Loaded, second: Recipe
) -> None:
    document = second.model_dump(mode="json")
    del document["towers"]["codes"], document["pairs"][1]
    result = run(bench, Recipe.model_validate(document), "job_second")
    body = bench.store.manifest(result.artifact).body
    origin = {"model": "model_a", "digest": bench.inputs["model_a"]["digest"], "modality": "text"}
    assert body["init_from"] == {"text": origin}
    assert body["data"].keys() == {"ds_imu", "ds_codes"}  # it knows the second through its text tower
    assert body["data"]["ds_imu"]["modalities"] == ["imu", "text"]
    assert [one["type"] for one in bench.said("job_second", "event")] == ["started_from"]


@pytest.mark.parametrize("step", [1, 7])
def test_a_run_with_low_rank_updates_resumes_bit_for_bit_without_the_model_it_came_from(
    bench: Any, learned: Loaded, second: Recipe, step: int
) -> None:
    whole = run(bench, second, "job_r")
    for later in range(step + 1, 10):
        bench.store.delete(f"checkpoints/job_r/{later}-1")
    del bench.inputs["model_a"]
    resumed = run(bench, second, "job_r", epoch=2, resume=[f"checkpoints/job_r/{step}-1"])
    first, again = weights(bench, whole), weights(bench, resumed)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any("lora_b" in name for name in saved_weights(bench, f"checkpoints/job_r/{step}-1"))
    bodies = [bench.store.manifest(result.artifact).body for result in (whole, resumed)]
    assert bodies[0]["init_from"] == bodies[1]["init_from"]
    assert bodies[0]["data"] == bodies[1]["data"]


def saved_weights(bench: Any, checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(bench.store.local(checkpoint) / "model" / "model.safetensors")


def test_a_checkpoint_can_be_started_from_and_served_as_well(bench: Any, learned: Loaded, second: Recipe) -> None:
    run(bench, second, "job_c")
    key = "checkpoints/job_c/6-1"
    bench.add_model(key, "job_c@6")
    served = load_model(bench.store.local(key), "cpu")
    document = second.model_dump(mode="json")
    for name in ("text", "codes"):
        document["towers"][name] |= {"init_from": {"model": "job_c@6"}, "locked": True, "lora": None}
    third = run(bench, Recipe.model_validate(document), "job_third")
    codes = Ragged(torch.randint(0, 24, (9,)), torch.tensor([4, 5]))
    assert torch.equal(
        load_model(bench.store.local(third.artifact), "cpu").model.encode("codes", codes),
        served.model.encode("codes", codes),
    )


def test_two_locked_towers_leave_a_pair_its_scale_to_learn(bench: Any, learned: Loaded, second: Recipe) -> None:
    document = second.model_dump(mode="json")
    for name in ("text", "codes"):
        document["towers"][name] |= {"init_from": {"model": "model_a"}, "locked": True, "lora": None}
    result = run(bench, Recipe.model_validate(document), "job_scale")
    assert result.logit_scales["codes+text"] != pytest.approx(14.285714)


def test_a_tower_learns_by_the_square_loss_to_give_the_vectors_of_a_locked_one(
    bench: Any, learned: Loaded, second: Recipe
) -> None:
    document = second.model_dump(mode="json")
    del document["towers"]["codes"], document["pairs"][1]
    document |= {"loss": {"kind": "square"}, "budget": BUDGET | {"steps": 60, "log_every": 1, "checkpoint_s": 3600}}
    result = run(bench, Recipe.model_validate(document), "job_square")
    losses = [told["values"]["loss/imu+text"] for told in bench.said("job_square", "metric")]
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
    before, after = learned.model.state_dict(), weights(bench, result)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("tower_text."))


@pytest.mark.parametrize("options", [{"positions": "rotary"}, {"pooling": "attention"}])
def test_every_kind_of_tower_trains_and_resumes_bit_for_bit_with_checkpointed_activations(
    bench: Any, recipe: MakeRecipe, options: dict[str, Any]
) -> None:
    document = recipe(budget=BUDGET, bank={"size": 32}).model_dump(mode="json")
    for tower in document["towers"].values():
        tower.update({"dropout": 0.1} | options)
    plain = Recipe.model_validate(document)
    saving = Recipe.model_validate(document | {"compute": {"activation_checkpointing": True}})
    whole = run(bench, plain, "job_k")
    for later in range(5, 10):
        bench.store.delete(f"checkpoints/job_k/{later}-1")
    resumed = run(bench, plain, "job_k", epoch=2, resume=["checkpoints/job_k/4-1"])
    recomputed = run(bench, saving, "job_a")
    first, *others = (weights(bench, one) for one in (whole, resumed, recomputed))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_a_model_that_is_gone_before_the_first_step_fails_the_job_by_name(
    bench: Any, learned: Loaded, second: Recipe
) -> None:
    del bench.inputs["model_a"]
    with pytest.raises(Permanent, match=r"recipe\.towers\.\w+\.init_from\.model: there is no model model_a"):
        run(bench, second, "job_gone")
