"""Embeddings, classification and composition for models whose vectors are compared in other ways than by the cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.contract.artifacts import open_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from service.contract.wire import ModelRef

pytestmark = pytest.mark.anyio

SCALE = float(np.exp(-1.0))
BIAS = -4.0
LOSSES: dict[str, dict[str, Any]] = {
    "dot": {"kind": "info_nce", "critic": "dot"},
    "sigmoid": {"kind": "sigmoid", "critic": "squared_distance", "init_bias": BIAS},
}
CODES = [{"modality": "code", "tokens": [at, 7, 9]} for at in range(3)]
STATES = [{"modality": "state", "tokens": [[float(at), 1.0, -1.0]]} for at in range(3)]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, publish_model: Any, run_inference: Any
) -> Iterator[tuple[Path, str, dict[str, ModelRef]]]:
    folder = tmp_path_factory.mktemp("served")
    store = open_store(str(folder / "store"))
    scales = dict.fromkeys(("image+text", "state+text", "code+text"), -1.0)
    models = {
        name: publish_model(store, f"models/model_{name}/1", seed=1, log_scales=scales, loss=loss)
        for name, loss in LOSSES.items()
    }
    endpoint = f"unix:{folder / 's'}"
    with run_inference(folder / "store", endpoint):
        yield folder / "store", endpoint, models


@pytest.fixture
async def api(start_served: Any, served: Any) -> AsyncIterator[Any]:
    async with start_served(*served, max_items=100, max_tokens=2000) as running:
        yield running


async def ask(api: Any, path: str, **body: Any) -> list[dict[str, Any]]:
    response = await api.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()["data"]


async def embed(api: Any, model: str, items: list[Any], **more: Any) -> np.ndarray:
    return np.array([each["embedding"] for each in await ask(api, "/v1/embeddings", model=model, input=items, **more)])


def logits(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if name == "dot":
        return SCALE * a @ b.T
    return -SCALE * ((a[:, None] - b[None]) ** 2).sum(2) / 2 + BIAS


@pytest.mark.parametrize("name", LOSSES)
async def test_vectors_are_as_the_towers_give_them_and_the_model_says_how_they_are_compared(
    api: Any, name: str
) -> None:
    z = await embed(api, name, CODES)
    assert (np.abs(np.linalg.norm(z, axis=1) - 1) > 1e-3).all()
    short = await embed(api, name, CODES, dimensions=3)
    np.testing.assert_allclose(short, z[:, :3])
    about = (await api.get(f"/v1/models/model_{name}")).json()
    assert about["critic"] == LOSSES[name]["critic"]
    biases = {"code+text": BIAS, "image+text": BIAS, "state+text": BIAS}
    assert about["logit_biases"] == (biases if name == "sigmoid" else {})


@pytest.mark.parametrize("name", LOSSES)
async def test_classification_goes_by_the_critic(api: Any, name: str) -> None:
    z, prompts = await embed(api, name, CODES), await embed(api, name, ["one", "two", "three"])
    f = logits(name, z, prompts)
    expected = np.stack([np.logaddexp(f[:, 0], f[:, 1]) - np.log(2), f[:, 2]], axis=1)
    body = {"model": name, "input": CODES, "labels": {"p": ["one", "two"], "q": ["three"]}}
    found = await ask(api, "/v1/classify", **body)

    def figures(rows: list[dict[str, Any]], what: str) -> np.ndarray:
        by_label = [{each["label"]: each[what] for each in row["predictions"]} for row in rows]
        return np.array([[row["p"], row["q"]] for row in by_label])

    np.testing.assert_allclose(figures(found, "logit"), expected, atol=1e-4)
    shares = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(figures(found, "score"), shares, atol=1e-4)
    by_mean = await ask(api, "/v1/classify", **body, ensemble="embedding")
    mean = logits(name, z, prompts[:2].mean(axis=0, keepdims=True))[:, 0]
    np.testing.assert_allclose(figures(by_mean, "logit")[:, 0], mean, atol=1e-4)
    alone = figures(await ask(api, "/v1/classify", **body, multi_label=True), "score")
    odds = expected if name == "sigmoid" else expected - expected[:, ::-1]
    np.testing.assert_allclose(alone, 1 / (1 + np.exp(-odds)), atol=1e-4)
    weighed = figures(await ask(api, "/v1/classify", **body, multi_label=True, prior={"p": 1, "q": 3}), "score")
    against = expected - expected[:, ::-1] + np.log([1 / 3, 3])
    np.testing.assert_allclose(weighed, 1 / (1 + np.exp(-against)), atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
async def test_vectors_of_the_callers_own_keep_their_length(api: Any, name: str) -> None:
    z = await embed(api, name, CODES)
    given = [{"modality": "code", "embedding": each.tolist()} for each in z]
    body = {"model": name, "target": ["one", "two"], "method": "direct"}
    assert await ask(api, "/v1/compose", source=given, **body) == await ask(api, "/v1/compose", source=CODES, **body)
    nothing = [{"modality": "code", "embedding": [0.0] * 8}]  # has no direction, and needs none here
    assert len(await ask(api, "/v1/compose", source=nothing, **body)) == 1
    huge = [{"modality": "code", "embedding": [1e300] * 8}]
    response = await api.post("/v1/compose", json={"source": huge, **body})
    assert response.status_code == 422
    assert "finite" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", LOSSES)
async def test_untrained_pairs_are_summed_over_or_compared_by_the_critic(api: Any, name: str) -> None:
    z = [await embed(api, name, items) for items in (CODES, STATES)]
    score = logits(name, *z)
    score = score / SCALE if name == "dot" else (score - BIAS) / SCALE
    found = await ask(api, "/v1/compose", model=name, source=CODES, target=STATES, method="direct")
    for row, expected in zip(found, score, strict=True):
        np.testing.assert_allclose({each["index"]: each["score"] for each in row["matches"]}[1], expected[1], atol=1e-4)
        assert any("inner products" in each for each in row["diagnostics"]["warnings"]) == (name == "dot")
    for row in await ask(api, "/v1/compose", model=name, source=CODES, target=STATES):
        assert row["diagnostics"]["method"] == "marginal"
        assert sum(each["posterior"] for each in row["matches"]) == pytest.approx(1, abs=1e-5)
