from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from service.contract.errors import Permanent, Transient
from service.contract.modality import TextTokens
from service.contract.recipe import Optimiser, Recipe
from service.contract.tokens import text
from worker.learning import finetuning, optim
from worker.learning.finetuning import build_learner, published, read_donors, take_over
from worker.learning.model import load_model, save_model
from worker.learning.ragged import Ragged

MakeRecipe = Callable[..., Recipe]
VOCAB = {"text": 260, "codes": 24}
FROM = {"init_from": {"model": "model_a"}}


def changed(recipe: Recipe, *, dimensions: int = 16, **towers: dict[str, Any]) -> Recipe:
    """Return the recipe with some fields of its towers changed."""
    document = json.loads(recipe.model_dump_json())
    for name, fields in towers.items():
        document["towers"][name] |= fields
    return Recipe.model_validate(document | {"dimensions": dimensions})


def learning(recipe: Recipe, modality: str) -> set[str]:
    torch.manual_seed(0)
    tower = build_learner(recipe, VOCAB).towers[modality]
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def ids(num_items: int) -> Ragged:
    torch.manual_seed(1)
    return Ragged(torch.randint(4, 260, (4 * num_items,)), torch.full((num_items,), 4))


def test_everything_learns_unless_the_recipe_says_otherwise(recipe: MakeRecipe) -> None:
    torch.manual_seed(0)
    model = build_learner(recipe(), VOCAB)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert learning(changed(recipe(), text=FROM), "text") == {
        name for name, _ in model.towers["text"].named_parameters()
    }


def test_what_learns_is_what_each_field_leaves(recipe: MakeRecipe) -> None:
    made = recipe()
    assert learning(changed(made, text=FROM | {"locked": True}), "text") == set()
    frozen = changed(made, text=FROM | {"depth": 2, "frozen_blocks": 1, "pooling": "attention"})
    assert {name.split(".")[0] for name in learning(frozen, "text")} == {"blocks", "norm", "pool", "readout"}
    assert all(not name.startswith("blocks.0.") for name in learning(frozen, "text"))
    assert learning(changed(made, text=FROM | {"frozen_blocks": 1}), "text") == {
        "norm.weight",
        "norm.bias",
        "readout.weight",
    }
    adapted = learning(changed(made, text=FROM | {"depth": 2, "frozen_blocks": 1, "lora": {}}), "text")
    factors = {f"blocks.1.{matrix}.lora_{half}" for matrix in ("qkv", "out", "up", "down") for half in "ab"}
    assert adapted == factors | {"readout.weight"}


def test_the_first_weights_do_not_depend_on_what_learns(recipe: MakeRecipe) -> None:
    states: list[dict[str, torch.Tensor]] = []
    for fields in ({}, FROM | {"locked": True}, FROM | {"lora": {"rank": 3}}):
        torch.manual_seed(0)
        states.append(build_learner(changed(recipe(), text=fields), VOCAB).state_dict())
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])


@pytest.mark.parametrize(
    "fields",
    [{"locked": True}, {"depth": 2, "frozen_blocks": 1}, {"lora": {}}, {"depth": 2, "lora": {}, "frozen_blocks": 1}],
)
def test_what_is_frozen_is_the_same_to_the_last_bit_after_training(recipe: MakeRecipe, fields: dict[str, Any]) -> None:
    made = changed(recipe(), text=FROM | {"dropout": 0.2} | fields)
    torch.manual_seed(0)
    model = build_learner(made, VOCAB).train()
    optimiser = optim.build(Optimiser(learning_rate=0.1, weight_decay=1.0), model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for _ in range(3):
        z, other = model.encode("text", ids(6)), model.encode("codes", Ragged(torch.arange(24), torch.full((6,), 4)))
        optimiser.zero_grad()
        (z * other).sum().backward()
        optimiser.step()
    after = model.state_dict()
    assert frozen
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved >= {f"tower_text.{name}" for name in learning(made, "text") if not name.endswith("lora_a")}


def test_a_locked_tower_builds_no_graph_and_drops_nothing_out(recipe: MakeRecipe) -> None:
    made = changed(recipe(), text=FROM | {"locked": True, "dropout": 0.5})
    torch.manual_seed(0)
    model = build_learner(made, VOCAB).train()
    z = model.encode("text", ids(3))
    assert not z.requires_grad
    assert z.grad_fn is None
    assert torch.equal(z, model.encode("text", ids(3)))
    assert model.encode("codes", Ragged(torch.arange(4), torch.tensor([4]))).requires_grad


def test_a_published_model_has_its_updates_merged_and_gives_the_same_vectors(recipe: MakeRecipe, tmp_path: Any) -> None:
    made = changed(recipe(), text=FROM | {"lora": {"rank": 2, "alpha": 8.0}})
    torch.manual_seed(0)
    model = build_learner(made, VOCAB).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    served = published(model, made, VOCAB)
    assert not any("lora" in name for name in served.state_dict())
    expected = model.encode("text", ids(5))
    torch.testing.assert_close(served.encode("text", ids(5)), expected, atol=1e-5, rtol=1e-5)
    files = {"text": text.train([], TextTokens())}
    for name, one in (("checkpoint", model), ("model", served)):  # as it learns, and as it is published
        save_model(one, tmp_path / name, recipe=made, tokeniser_files=files, banks={}, extra={})
        loaded = load_model(tmp_path / name, "cpu").model
        assert torch.equal(loaded.encode("text", ids(5)), served.encode("text", ids(5)))
    assert published(served, recipe(), VOCAB) is served


def test_a_tower_starts_as_the_one_that_it_is_taken_from(recipe: MakeRecipe, trained: Any) -> None:
    made = changed(recipe(), text=FROM | {"lora": {}}, imu={"init_from": {"model": "model_a", "modality": "imu"}})
    context = trained.context("job_take")
    donors = read_donors(made, context)
    torch.manual_seed(9)
    model = build_learner(made, VOCAB).eval()
    take_over(model, donors, context)
    teacher = load_model(trained.store.local(trained.inputs["model_a"]["artifact"]), "cpu")
    assert torch.equal(model.encode("text", ids(5)), teacher.model.encode("text", ids(5)))
    assert torch.equal(model.towers["imu"].state_dict()["mean"], teacher.model.towers["imu"].state_dict()["mean"])
    file = trained.store.read(trained.inputs["model_a"]["artifact"], "tokenizers/text.json")
    assert finetuning.tokenisers_of(donors) == {"text": {"tokenizer.json": file}}
    told = trained.said("job_take", "event")
    assert [(one["type"], one["detail"]["tower"], one["detail"]["readout"]) for one in told] == [
        ("started_from", "imu", "taken over"),
        ("started_from", "text", "taken over"),
    ]
    assert finetuning.inherited({name: donor.origin for name, donor in donors.items()}).keys() == {"ds_imu", "ds_codes"}


def test_a_space_of_other_dimensions_gets_a_new_read_out_and_nothing_else(recipe: MakeRecipe, trained: Any) -> None:
    made = changed(recipe(), dimensions=24, text=FROM)
    context = trained.context("job_dims")
    torch.manual_seed(9)
    model = build_learner(made, VOCAB)
    readout = model.towers["text"].readout
    assert readout is not None
    drawn = readout.weight.clone()
    take_over(model, read_donors(made, context), context)
    teacher = load_model(trained.store.local(trained.inputs["model_a"]["artifact"]), "cpu").model.towers["text"]
    state = model.towers["text"].state_dict()
    assert torch.equal(state.pop("readout.weight"), drawn)
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in state.items())
    (told,) = trained.said("job_dims", "event")
    assert told["detail"]["readout"] == "drawn anew"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 32}, "recipe.towers.text: width is 32 here and 16 in the model"),
        ({"positions": "rotary"}, "recipe.towers.text: positions is rotary here and learned in the model"),
        ({"init_from": {"model": "model_a", "modality": "sound"}}, "has no modality 'sound'; it has codes, imu, text"),
        ({"init_from": {"model": "model_a", "modality": "codes"}}, "recipe.towers.text: tokens.kind is text here"),
        ({"init_from": {"model": "model_gone"}}, "recipe.towers.text.init_from.model: there is no model model_gone"),
    ],
)
def test_a_tower_that_cannot_start_there_is_refused_by_name(
    recipe: MakeRecipe, trained: Any, fields: dict[str, Any], message: str
) -> None:
    context = trained.context(f"job_refused_{len(message)}")
    with pytest.raises(Permanent, match=message):
        read_donors(changed(recipe(), text=FROM | fields), context)


def test_a_checkpoint_that_was_pruned_since_is_worth_another_try(recipe: MakeRecipe, trained: Any) -> None:
    gone = trained.inputs["model_a"] | {"artifact": "checkpoints/job_x/5-1", "id": "job_x@5"}
    trained.inputs["job_x@latest"] = gone
    made = changed(recipe(), text={"init_from": {"model": "job_x@latest"}})
    with pytest.raises(Transient, match=r"recipe\.towers\.text\.init_from\.model: job_x@latest was removed"):
        read_donors(made, trained.context("job_pruned"))
    del trained.inputs["job_x@latest"]
