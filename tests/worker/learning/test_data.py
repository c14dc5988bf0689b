from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.recipe import Recipe
from service.contract.tokens import tokenise
from worker.learning import data, reading
from worker.learning.data import Dataset, Encoder, PairData, TokenSource
from worker.learning.model import MultiTower, build_tokenisers, vocab_sizes

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def datasets(bench: Any) -> dict[str, Dataset]:
    context = bench.context("job_data")
    return {name: data.open_dataset(name, context) for name in ("ds_imu", "ds_codes")}


def open_pairs(recipe: Recipe, datasets: dict[str, Dataset], batch_size: int = 32) -> list[PairData]:
    files = data.train_tokenisers(recipe, datasets)
    return reading.open_pairs(recipe, datasets, build_tokenisers(recipe, files), batch_size)


def test_only_training_captions_teach_the_tokeniser(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    samples = datasets["ds_imu"].samples
    captions = list(data._captions("text", [samples, datasets["ds_codes"].samples]))
    assert len(captions) == 640
    assert captions[0] == samples.payload("text", int(samples.indices("train")[0])).decode()


def test_a_draw_is_a_subset_in_order_and_the_same_every_time(datasets: dict[str, Dataset]) -> None:
    samples = datasets["ds_imu"].samples
    drawn = data.draw(samples, "holdout", 30, seed=1)
    assert len(drawn) == 30
    assert sorted(set(drawn.tolist())) == drawn.tolist()
    assert set(drawn.tolist()) <= set(samples.indices("holdout").tolist())
    assert drawn.tolist() == data.draw(samples, "holdout", 30, seed=1).tolist()
    assert data.draw(samples, "holdout", 1000, seed=1).tolist() == samples.indices("holdout").tolist()


def test_encoding_in_batches_tells_of_each_and_gives_all(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    made = recipe()
    pairs = open_pairs(made, datasets)
    torch.manual_seed(0)
    tokenisers = build_tokenisers(made, data.train_tokenisers(made, datasets))
    model = MultiTower(made, vocab_sizes(made, tokenisers)).eval()
    data.measure(model, pairs)
    heard: list[int] = []
    encoder = Encoder(model, torch.device("cpu"), heard.append)
    source = pairs[0].sources[0]
    batches = list(encoder.in_batches(source, np.arange(50), 20))
    assert [len(batch) for batch in batches] == [20, 20, 10]
    assert heard == [20, 20, 10]
    torch.testing.assert_close(torch.cat(batches), encoder(source, np.arange(50)), atol=1e-5, rtol=1e-5)


def test_a_sensor_is_measured_on_its_training_samples(recipe: MakeRecipe, datasets: dict[str, Dataset]) -> None:
    made = recipe()
    pairs = open_pairs(made, datasets)
    model = MultiTower(made, {"codes": 24, "text": 260})
    data.measure(model, pairs)
    values = pairs[0].sources[0](pairs[0].indices).values
    torch.testing.assert_close(model.towers["imu"].state_dict()["mean"], values.mean(0))
    torch.testing.assert_close(model.towers["imu"].state_dict()["deviation"], values.std(0, correction=0))


def test_tokens_that_are_made_already_are_encoded_in_the_recipes_precision(
    recipe: MakeRecipe, datasets: dict[str, Dataset]
) -> None:
    """Prompts that a caller gives and captions of a data set must not differ in how exactly they are computed."""
    made = recipe(precision="bf16")
    torch.manual_seed(0)
    model = MultiTower(made, {"text": 260, "codes": 24}).eval()
    encoder = Encoder(model, torch.device("cpu"), lambda _: None)
    source = TokenSource(datasets["ds_codes"], "codes", tokenise.build(made.towers["codes"].tokens, {}))
    indices = np.arange(5)
    assert torch.equal(encoder.encode("codes", source(indices)), encoder(source, indices))
    with torch.inference_mode():
        exact = model.encode("codes", source(indices))
    assert not torch.equal(encoder.encode("codes", source(indices)), exact)
