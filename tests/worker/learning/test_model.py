from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from service.contract.losses import InfoNCE
from service.contract.modality import TextTokens
from service.contract.recipe import Recipe
from service.contract.tokens import text
from worker.learning import losses
from worker.learning.model import Bank, MultiTower, build_tokenisers, load_model, save_model, vocab_sizes
from worker.learning.ragged import Ragged
from worker.learning.towers.transformer import Transformer

MakeRecipe = Callable[..., Recipe]
FILES = {"text": text.train(["a zero", "the one"], TextTokens(max_length=16))}


def build(recipe: Recipe) -> MultiTower:
    torch.manual_seed(0)
    return MultiTower(recipe, vocab_sizes(recipe, build_tokenisers(recipe, FILES)))


def imu(num_items: int, seed: int = 0, num_windows: int = 1) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged.from_sequences(
        [
            [rng.normal(size=(int(rng.integers(1, 9)), 3)).astype(np.float32) for _ in range(num_windows)]
            for _ in range(num_items)
        ]
    )


def codes(num_items: int, seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged.from_sequences([[rng.integers(0, 24, 5, np.int32)] for _ in range(num_items)])


def test_every_modality_lands_on_one_unit_sphere(recipe: MakeRecipe) -> None:
    model = build(recipe())
    z = model.encode("imu", imu(6))
    assert z.shape == (6, 16)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(6))
    assert model.encode("codes", codes(4)).shape == (4, 16)


def test_an_item_of_several_windows_is_the_mean_of_their_unit_vectors(recipe: MakeRecipe) -> None:
    model = build(recipe())
    batch = imu(3, num_windows=4)
    z = model.encode("imu", batch)
    windows = model.encode("imu", Ragged(batch.values, batch.lengths))
    expected = torch.nn.functional.normalize(windows.view(3, 4, -1).mean(1), dim=1)
    torch.testing.assert_close(z, expected)


@torch.no_grad()
def test_a_scale_belongs_to_a_pair_in_either_order_and_never_leaves_its_bound(recipe: MakeRecipe) -> None:
    model = build(recipe(loss=InfoNCE(init_scale=20.0, max_scale=30.0).model_dump()))
    assert float(model.scale("imu", "text")) == pytest.approx(20.0)
    assert model.is_trained("text", "codes")
    assert not model.is_trained("imu", "codes")
    model.log_scales["imu+text"].fill_(10.0)
    model.clamp_scales()
    assert float(model.scale("text", "imu")) == pytest.approx(30.0)
    assert float(model.scale("codes", "text")) == pytest.approx(20.0)


def test_a_scale_that_is_not_learned_gets_no_gradient(recipe: MakeRecipe) -> None:
    model = build(recipe(loss=InfoNCE(learn_scale=False).model_dump()))
    assert not any(log_scale.requires_grad for log_scale in model.log_scales.values())


@pytest.mark.parametrize("name", ["type", "train", "forward", "towers"])
def test_a_modality_may_be_called_what_torch_calls_its_own(name: str, recipe: MakeRecipe) -> None:
    document = json.loads(recipe().model_dump_json())
    document["towers"][name] = document["towers"].pop("imu")
    document["pairs"][0]["modalities"] = [name, "text"]
    model = build(Recipe.model_validate(document))
    assert model.encode(name, imu(2)).shape == (2, 16)


def measure(model: MultiTower, batch: Ragged) -> None:
    tower = model.towers["imu"]
    assert isinstance(tower, Transformer)
    tower.measure(batch.values)


def test_one_gradient_step_lowers_the_loss(recipe: MakeRecipe) -> None:
    model = build(recipe())
    measure(model, imu(32))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss() -> torch.Tensor:
        return losses.compute(
            InfoNCE(), model.encode("imu", imu(32)), model.encode("codes", codes(32)), torch.tensor(10.0)
        )

    before = loss()
    before.backward()
    optimiser.step()
    assert float(loss().detach()) < float(before.detach())


@pytest.mark.parametrize("num_windows", [1, 3])
def test_a_saved_model_gives_the_same_vectors_bit_for_bit(num_windows: int, recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe()
    model = build(made).eval()
    measure(model, imu(50))
    bank = Bank(
        {"imu": torch.randn(5, 16), "text": torch.randn(5, 16)}, {"imu": imu(5, 1, num_windows), "text": codes(5)}
    )
    body = save_model(model, tmp_path, recipe=made, tokeniser_files=FILES, banks={"imu+text": bank}, extra={"step": 7})
    loaded = load_model(tmp_path, "cpu")
    assert torch.equal(loaded.model.encode("imu", imu(9, 2)), model.encode("imu", imu(9, 2)))
    assert torch.equal(loaded.model.encode("codes", codes(9)), model.encode("codes", codes(9)))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.recipe == made
    assert loaded.tokenisers["text"].vocab_size == 260
    assert loaded.num_bytes > 0
    assert body["pairs"] == [["codes", "text"], ["imu", "text"]]
    assert body["banks"] == {"imu+text": {"size": 5, "items": True}}
    assert body["logit_scales"] == {"imu+text": pytest.approx(14.2857), "codes+text": pytest.approx(14.2857)}
    assert body["step"] == 7
    assert list(body["modalities"]) == ["imu", "codes", "text"]
    json.dumps(body)
    found = loaded.banks["imu+text"]
    assert torch.equal(found.vectors["imu"], bank.vectors["imu"])
    assert torch.equal(found.items["imu"].values, bank.items["imu"].values)
    assert found.items["imu"].num_items == 5
    assert found.items["text"].values.dtype == torch.int64


def test_nothing_in_a_model_is_a_pickle(recipe: MakeRecipe, tmp_path: Path) -> None:
    made = recipe()
    save_model(build(made), tmp_path, recipe=made, tokeniser_files=FILES, banks={}, extra={})
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["model.safetensors", "recipe.json", "tokenizers/text.json"]


@pytest.mark.parametrize("critic", ["dot", "squared_distance"])
def test_without_the_cosine_vectors_stay_as_towers_give_them(critic: str, recipe: MakeRecipe) -> None:
    model = build(recipe(loss={"kind": "info_nce", "critic": critic})).eval()
    batch = imu(6, num_windows=2)
    whole = model.encode("imu", batch)
    each = model.towers["imu"](Ragged(batch.values, batch.lengths))
    torch.testing.assert_close(whole, each.view(6, 2, -1).mean(1))
    assert (whole.norm(dim=1) - 1).abs().max() > 1e-3


def test_the_sigmoid_loss_brings_a_bias_and_others_none(recipe: MakeRecipe) -> None:
    model = build(recipe(loss={"kind": "sigmoid"}))
    bias = model.bias("text", "imu")
    assert bias is not None
    assert bias.item() == -10.0
    assert model.bias("imu", "codes") is None
    plain = build(recipe())
    assert plain.bias("imu", "text") is None
    assert not any(name.startswith("biases") for name in plain.state_dict())
