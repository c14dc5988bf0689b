"""Imported towers in recipes: held still under other towers, with a read-out of their own, or learning on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from service.contract.errors import Interrupted, Permanent
from service.contract.jobs import EmbedArgs, ImportModelArgs, TrainArgs
from service.contract.recipe import Recipe
from service.contract.tokens.tokenise import TextRaw
from tests import checkpoints
from worker.jobs import embed, import_model, train
from worker.learning.model import Loaded, load_model
from worker.learning.ragged import Ragged

BUDGET = {"steps": 12, "batch_size": 16, "checkpoint_s": 0, "keep_checkpoints": 50, "log_every": 6}
MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_sentences(tmp_path_factory.mktemp("made") / "bert")


@pytest.fixture
def sentences(bench: Any, folder: Path) -> Loaded:
    """A model of text alone, of 32 dimensions: `model_s` among the inputs."""
    result = import_model.run(ImportModelArgs(source=str(folder)), bench.context("job_import"))
    bench.add_model(result.artifact, "model_s")
    return load_model(bench.store.local(result.artifact), "cpu")


@pytest.fixture
def under(sentences: Loaded, recipe: MakeRecipe) -> Callable[..., Recipe]:
    """Write a recipe that trains imu under the imported text tower."""

    def write(dimensions: int = 16, budget: dict[str, Any] = BUDGET, **text: Any) -> Recipe:
        document = json.loads(recipe(budget=budget, bank={"size": 32}, dimensions=dimensions).model_dump_json())
        del document["towers"]["codes"], document["pairs"][1]
        tower = json.loads(sentences.recipe.towers["text"].model_dump_json())
        readout = {"readout": dimensions != 32}
        document["towers"]["text"] = tower | {"init_from": {"model": "model_s"}} | readout | text
        return Recipe.model_validate(document)

    return write


def run(bench: Any, recipe: Recipe, job: str, **options: Any) -> Any:
    return train.run(TrainArgs(recipe=recipe), bench.context(job, **options))


def weights(bench: Any, artifact: str) -> dict[str, torch.Tensor]:
    return load_file(bench.store.local(artifact) / "model.safetensors")


@torch.inference_mode()
def vectors(loaded: Loaded) -> torch.Tensor:
    texts = ["the seven", "a two", "a photo of a cat"]
    return loaded.model.encode("text", Ragged.from_sequences([loaded.tokenisers["text"](TextRaw(t)) for t in texts]))


def test_a_locked_tower_learns_a_new_read_out_and_nothing_else(bench: Any, sentences: Loaded, under: Any) -> None:
    result = run(bench, under(locked=True, new_readout=True), "job_lit")
    before, after = sentences.model.state_dict(), weights(bench, result.artifact)
    inner = [name for name in before if name.startswith("tower_text.inner.")]
    assert len(inner) > 30
    assert all(torch.equal(before[name], after[name]) for name in inner)
    assert after["tower_text.readout.weight"].shape == (16, 32)
    (event,) = [one["detail"] for one in bench.said("job_lit", "event") if one["type"] == "started_from"]
    assert (event["tower"], event["model"], event["readout"]) == ("text", "model_s", "drawn anew")
    # It stands alone: the model that it came from can go.
    bench.store.delete(bench.inputs.pop("model_s")["artifact"])
    loaded = load_model(bench.store.local(result.artifact), "cpu")
    assert vectors(loaded).shape == (3, 16)
    losses = [one["values"]["loss/imu+text"] for one in bench.said("job_lit", "metric")]
    assert losses[-1] < losses[0]
    bench.add_model(result.artifact, "model_lit")
    made = embed.run(EmbedArgs(model="model_lit", dataset="ds_imu", modality="text"), bench.context("job_embed"))
    assert made.dimensions == 16


def test_the_read_out_that_was_learned_goes_on_with_its_tower(
    bench: Any, sentences: Loaded, under: Any, recipe: MakeRecipe
) -> None:
    first = run(bench, under(locked=True, new_readout=True), "job_first")
    bench.add_model(first.artifact, "model_first")
    second = under(locked=True, init_from={"model": "model_first"})
    found = load_model(bench.store.local(run(bench, second, "job_second").artifact), "cpu")
    assert torch.equal(vectors(found), vectors(load_model(bench.store.local(first.artifact), "cpu")))
    with pytest.raises(Permanent, match="readout is False here and True in the model to start from"):
        run(bench, under(32, locked=True, init_from={"model": "model_first"}), "job_third")


def test_a_locked_tower_keeps_the_vectors_of_its_model(bench: Any, sentences: Loaded, under: Any) -> None:
    result = run(bench, under(32, locked=True), "job_locked")
    assert torch.equal(vectors(load_model(bench.store.local(result.artifact), "cpu")), vectors(sentences))


def test_a_locked_tower_without_a_new_read_out_needs_its_own_dimensions(bench: Any, under: Any) -> None:
    with pytest.raises(Permanent, match=r"dimensions is 16 here and 32 .* needs new_readout") as caught:
        run(bench, under(locked=True), "job_refused")
    assert caught.value.code == "start_differs"


def test_first_blocks_stay_and_the_others_learn(bench: Any, sentences: Loaded, under: Any) -> None:
    result = run(bench, under(frozen_blocks=1), "job_frozen")
    before, after = sentences.model.state_dict(), weights(bench, result.artifact)
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert any("encoder.layer.1." in name for name in changed)
    assert all("encoder.layer.1." in name for name in changed if name.startswith("tower_text.inner"))


def test_a_tower_that_learns_resumes_bit_for_bit_without_the_model_it_came_from(
    bench: Any, sentences: Loaded, under: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = under()  # its dropout is the checkpoint's own
    whole = run(bench, made, "job_whole")
    context = bench.context("job_cut")
    steps = iter(range(100))
    check = context.check

    def interrupt() -> None:
        if next(steps) == 7:
            raise Interrupted
        check()

    monkeypatch.setattr(context, "check", interrupt)
    with pytest.raises(Interrupted):
        train.run(TrainArgs(recipe=made), context)
    del bench.inputs["model_s"]
    saved = [one["artifact"] for one in bench.said("job_cut", "checkpoint")][::-1]
    resumed = run(bench, made, "job_cut", epoch=2, resume=saved)
    one, other = weights(bench, whole.artifact), weights(bench, resumed.artifact)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_and_checkpointed_activations_change_nothing_but_rounding(
    bench: Any, sentences: Loaded, under: Any
) -> None:
    plain_recipe = under(budget=BUDGET | {"steps": 3}, frozen_blocks=1)
    made = json.loads(plain_recipe.model_dump_json())
    plain = weights(bench, run(bench, plain_recipe, "job_plain").artifact)
    made["compute"] = {"activation_checkpointing": True}
    kept = weights(bench, run(bench, Recipe.model_validate(made), "job_kept").artifact)
    assert all(torch.allclose(plain[name], kept[name], atol=1e-6) for name in plain)
    made["towers"]["text"] |= {"locked": True, "new_readout": True, "frozen_blocks": 0}
    still = weights(bench, run(bench, Recipe.model_validate(made), "job_still").artifact)
    made["compute"] |= {"micro_batch": 5}
    other = weights(bench, run(bench, Recipe.model_validate(made), "job_micro").artifact)
    # Keys have a bias whose gradient is rounding alone, which AdamW makes steps of.
    assert all(torch.allclose(still[name], other[name], atol=1e-4) for name in still if not name.endswith("qkv.bias"))


def test_another_configuration_is_another_model(bench: Any, under: Any, sentences: Loaded) -> None:
    config = json.loads(sentences.recipe.towers["text"].model_dump_json())["config"]
    with pytest.raises(Permanent, match="config is not that of the model"):
        run(bench, under(config=config | {"hidden_dropout_prob": 0.0}), "job_differs")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_from": None}, "needs init_from"),
        ({"locked": True, "frozen_blocks": 1}, "a locked tower learns nothing"),
        ({"frozen_blocks": 3}, "more than depth 2"),
        ({"readout": False}, "its vectors have 32 values and the space 16: set readout"),
        ({"readout": False, "new_readout": True}, "new_readout needs readout"),
        ({"augment": {"kind": "tokens"}}, "cannot be left out"),
        ({"augment": {"kind": "image"}}, "does not fit text"),
        ({"lora": {"rank": 2}}, "lora"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(under: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        under(**changes)
