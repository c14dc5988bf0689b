from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from service.contract.recipe import Recipe
from worker.learning import data, reading
from worker.learning.bank import draw_banks
from worker.learning.data import Encoder, PairData
from worker.learning.model import MultiTower, build_tokenisers, vocab_sizes

MakeRecipe = Callable[..., Recipe]


def prepare(bench: Any, recipe: Recipe) -> tuple[Encoder, list[PairData]]:
    context = bench.context("job_bank")
    datasets = {name: data.open_dataset(name, context) for name in bench.inputs}
    tokenisers = build_tokenisers(recipe, data.train_tokenisers(recipe, datasets))
    torch.manual_seed(0)
    model = MultiTower(recipe, vocab_sizes(recipe, tokenisers)).eval()
    return Encoder(model, torch.device("cpu"), lambda _: None), reading.open_pairs(recipe, datasets, tokenisers, 8)


def test_row_k_of_both_modalities_is_the_same_sample_with_its_vector(bench: Any, recipe: MakeRecipe) -> None:
    made = recipe(bank={"size": 600})
    encoder, pairs = prepare(bench, made)
    bank = draw_banks(encoder, made, pairs)["codes+text"]
    assert bank.vectors["codes"].shape == bank.vectors["text"].shape == (600, 16)
    captions_of: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for index in pairs[1].indices.tolist():
        codes, text = (tuple(source._sequences(index)[0].tolist()) for source in pairs[1].sources)
        captions_of.setdefault(codes, set()).add(text)
    for at in range(0, 600, 7):
        codes, text = (tuple(bank.items[name].take([at]).values.tolist()) for name in ("codes", "text"))
        assert text in captions_of[codes]
        for name in ("codes", "text"):
            expected = encoder.model.encode(name, bank.items[name].take([at]))[0]
            torch.testing.assert_close(bank.vectors[name][at], expected, atol=1e-5, rtol=1e-5)


def test_a_bank_is_drawn_with_replacement_from_training_samples_only(bench: Any, recipe: MakeRecipe) -> None:
    made = recipe(bank={"size": 2000})
    encoder, pairs = prepare(bench, made)
    bank = draw_banks(encoder, made, pairs)["imu+text"]
    counts = Counter(tuple(row) for row in bank.vectors["imu"].tolist())
    assert 300 <= len(counts) <= 320  # of the 320 training samples, about e^-6 of them are never drawn
    assert max(counts.values()) < 25


def test_data_sets_of_one_pair_share_its_bank_by_weight(bench: Any, recipe: MakeRecipe) -> None:
    imu = [(f"x{at}", {"imu": bench_npy([[100.0 + at, 0, 0]]), "text": b"far away"}, "", False) for at in range(20)]
    bench.publish("ds_more", {"imu": "continuous", "text": "text"}, imu)
    document = recipe(bank={"size": 1000}).model_dump(mode="json")
    document["pairs"].append({"dataset": "ds_more", "modalities": ["text", "imu"], "weight": 3.0})
    made = Recipe.model_validate(document)
    encoder, pairs = prepare(bench, made)
    items = draw_banks(encoder, made, pairs)["imu+text"].items["imu"]
    starts = items.lengths.cumsum(0) - items.lengths
    assert float((items.values[starts, 0] >= 100).double().mean()) == pytest.approx(0.75, abs=0.06)


def bench_npy(rows: list[list[float]]) -> bytes:
    import io

    import numpy as np

    out = io.BytesIO()
    np.save(out, np.array(rows, np.float32))
    return out.getvalue()


def test_vectors_keep_no_items_and_none_keeps_nothing(bench: Any, recipe: MakeRecipe) -> None:
    made = recipe(bank={"size": 64, "keep": "vectors"})
    encoder, pairs = prepare(bench, made)
    banks = draw_banks(encoder, made, pairs)
    assert sorted(banks) == ["codes+text", "imu+text"]
    assert all(bank.items == {} and len(bank.vectors["text"]) == 64 for bank in banks.values())
    assert draw_banks(encoder, recipe(bank={"size": 64, "keep": "none"}), pairs) == {}


def test_one_seed_draws_one_bank(bench: Any, recipe: MakeRecipe) -> None:
    made = recipe(bank={"size": 64})
    encoder, pairs = prepare(bench, made)
    first, again = draw_banks(encoder, made, pairs), draw_banks(encoder, made, pairs)
    assert torch.equal(first["imu+text"].vectors["imu"], again["imu+text"].vectors["imu"])
    other = draw_banks(encoder, recipe(bank={"size": 64}, seed=9), pairs)
    assert not torch.equal(first["imu+text"].vectors["imu"], other["imu+text"].vectors["imu"])
