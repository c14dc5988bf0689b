from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.errors import Permanent
from service.contract.recipe import Recipe
from worker.learning import data, reading
from worker.learning.data import Dataset, PairData, TokenSource
from worker.learning.model import build_tokenisers

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def datasets(bench: Any) -> dict[str, Dataset]:
    context = bench.context("job_data")
    return {name: data.open_dataset(name, context) for name in ("ds_imu", "ds_codes")}


def open_pairs(recipe: Recipe, datasets: dict[str, Dataset], batch_size: int = 32) -> list[PairData]:
    files = data.train_tokenisers(recipe, datasets)
    return reading.open_pairs(recipe, datasets, build_tokenisers(recipe, files), batch_size)


def test_an_epoch_holds_every_training_sample_once_and_no_other(
    recipe: MakeRecipe, datasets: dict[str, Dataset]
) -> None:
    pair = open_pairs(recipe(), datasets)[0]
    seen = np.concatenate([pair.batch_indices(visit) for visit in range(10)])  # 320 training samples
    assert sorted(seen.tolist()) == datasets["ds_imu"].samples.indices("train").tolist()
    later = np.concatenate([pair.batch_indices(visit) for visit in range(10, 20)])
    assert sorted(later.tolist()) == sorted(seen.tolist())
    assert later.tolist() != seen.tolist()


def test_the_rest_that_fills_no_batch_is_dropped(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    pair = open_pairs(recipe(), datasets, batch_size=100)[0]
    first = np.concatenate([pair.batch_indices(visit) for visit in range(3)])
    assert len(set(first.tolist())) == 300


def test_a_batch_is_a_function_of_seed_pair_and_visit(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    first, again = open_pairs(recipe(), datasets), open_pairs(recipe(), datasets)
    assert again[1].batch_indices(17).tolist() == first[1].batch_indices(17).tolist()
    assert first[0].batch_indices(17).tolist() != first[1].batch_indices(17).tolist()
    other = open_pairs(recipe(seed=4), datasets)
    assert other[1].batch_indices(17).tolist() != first[1].batch_indices(17).tolist()


def test_rows_of_a_batch_are_the_same_samples(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    pair = open_pairs(recipe(), datasets)[1]
    codes, captions = pair.batch(3)
    indices = pair.batch_indices(3).tolist()
    assert codes.lengths.tolist() == [
        len(np.load(__import__("io").BytesIO(pair.dataset.samples.payload("codes", index)))) for index in indices
    ]
    assert captions.lengths.tolist() == [len(pair.dataset.samples.payload("text", index)) + 2 for index in indices]


@pytest.mark.parametrize(
    ("weights", "expected"), [((1.0, 1.0), (50, 50)), ((3.0, 1.0), (75, 25)), ((9.0, 1.0), (90, 10))]
)
def test_steps_are_shared_out_by_weight_and_evenly(weights: tuple[float, float], expected: tuple[int, int]) -> None:
    drawn = [0, 0]
    order: list[int] = []
    for _ in range(100):
        at = reading.next_pair(drawn, weights)
        drawn[at] += 1
        order.append(at)
        for pair, weight in enumerate(weights):
            assert abs(drawn[pair] - len(order) * weight / sum(weights)) <= 1
    assert tuple(drawn) == expected


def test_tokens_are_kept_up_to_the_limit(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    made = recipe()
    tokeniser = build_tokenisers(made, data.train_tokenisers(made, datasets))["codes"]
    source = TokenSource(datasets["ds_codes"], "codes", tokeniser, cache_bytes=100)
    everything = datasets["ds_codes"].samples.indices("all")
    first, again = source(everything), source(everything)
    assert torch.equal(first.values, again.values)
    assert 4 <= len(source._kept) <= 8
    assert sum(kept[0].nbytes for kept in source._kept.values()) <= 100


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers(
    recipe: MakeRecipe, datasets: dict[str, Dataset]
) -> None:
    with pytest.raises(Permanent, match=r"pairs\[0\]: data set ds_imu has 320 training samples.*321"):
        open_pairs(recipe(), datasets, batch_size=321)


def test_a_modality_that_the_data_do_not_hold_is_refused_by_name(
    recipe: MakeRecipe, datasets: dict[str, Dataset]
) -> None:
    tokenisers = build_tokenisers(made := recipe(), data.train_tokenisers(made, datasets))
    with pytest.raises(Permanent, match="ds_codes has no modality 'imu'; it has codes, text"):
        TokenSource(datasets["ds_codes"], "imu", tokenisers["imu"])
    with pytest.raises(Permanent, match="'codes' is discrete in data set ds_codes, the model's tower reads continuous"):
        TokenSource(datasets["ds_codes"], "codes", tokenisers["imu"])


def test_a_sample_that_does_not_fit_the_recipe_is_named(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    made = recipe()
    small = made.towers["codes"].tokens.model_copy(update={"vocab": 4})
    made.towers["codes"] = made.towers["codes"].model_copy(update={"tokens": small})
    tokenisers = build_tokenisers(made, data.train_tokenisers(made, datasets))
    source = TokenSource(datasets["ds_codes"], "codes", tokenisers["codes"])
    with pytest.raises(Permanent, match=r"sample 'c\d+' of data set ds_codes, codes: ids lie in 0 to 3"):
        source(datasets["ds_codes"].samples.indices("all"))
