"""Composition by every method, over bridges of the caller's own and over chains of legs, in a real process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.contract.artifacts import open_store
from service.contract.operations import ComposeResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from service.contract.wire import ModelRef

pytestmark = pytest.mark.anyio

MODELS: dict[str, dict[str, Any]] = {
    "a": {"seed": 1},
    "b": {"seed": 2},
    "sharp": {"seed": 3, "log_scales": dict.fromkeys(("image+text", "state+text", "code+text"), 5.0)},
    "bare": {"seed": 1, "keep": "none"},
    "dot": {"seed": 1, "loss": {"kind": "info_nce", "critic": "dot"}},
    "far": {"seed": 1, "log_scales": {}, "loss": {"kind": "info_nce", "critic": "squared_distance"}},
}
SCALE = float(np.exp(1.5))
STATES = [{"modality": "state", "tokens": [[float(at), 1.0, -1.0]]} for at in range(3)]
CODES = [{"modality": "code", "tokens": [at, 7, 9]} for at in range(4)]
TEXTS = [f"caption {at}" for at in range(9)]
ONE = {"model": "a", "source": STATES, "target": CODES}
CHAIN = [
    {"model": "a", "from": "state", "to": "text"},
    {"model": "b", "from": "text", "to": "code"},
    {"model": "a", "from": "code", "to": "text"},
]
LONG = {"legs": CHAIN, "source": STATES, "target": TEXTS}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, publish_model: Any, run_inference: Any
) -> Iterator[tuple[Path, str, dict[str, ModelRef]]]:
    folder = tmp_path_factory.mktemp("served")
    store = open_store(str(folder / "store"))
    models = {name: publish_model(store, f"models/model_{name}/1", **about) for name, about in MODELS.items()}
    endpoint = f"unix:{folder / 's'}"
    with run_inference(folder / "store", endpoint):
        yield folder / "store", endpoint, models


@pytest.fixture
async def api(start_served: Any, served: Any) -> AsyncIterator[Any]:
    async with start_served(*served, max_items=100, max_tokens=2000) as running:
        yield running


async def ask(api: Any, **body: Any) -> list[dict[str, Any]]:
    response = await api.post("/v1/compose", json={"top_k": 10, **body})
    assert response.status_code == 200, response.text
    ComposeResponse.model_validate_json(response.content)
    return response.json()["data"]


async def embed(api: Any, model: str, items: list[Any]) -> np.ndarray:
    response = await api.post("/v1/embeddings", json={"model": model, "input": items})
    assert response.status_code == 200, response.text
    return np.array([each["embedding"] for each in response.json()["data"]])


def ratios(rows: list[dict[str, Any]]) -> np.ndarray:
    """Undo the ranking: (source, target)."""
    by_target = [{each["index"]: each["log_ratio"] for each in row["matches"]} for row in rows]
    return np.array([[row[at] for at in sorted(row)] for row in by_target])


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    return np.log(np.exp(values).mean(axis=axis, keepdims=True))


async def test_a_chain_of_three_legs_is_the_sum_over_both_bridges(api: Any) -> None:
    """By hand: the inner table balanced to ratios, then one product after the other; each leg with its own model."""
    texts, codes = TEXTS[:6], [{"modality": "code", "tokens": [at, 3]} for at in range(5)]
    rows = await ask(api, **LONG, through=[{"through": texts}, {"through": codes}])
    in_a = {name: await embed(api, "a", items) for name, items in (("s", STATES), ("b", texts), ("d", TEXTS))}
    in_b = {name: await embed(api, "b", items) for name, items in (("b", texts), ("c", codes))}
    f, g = SCALE * in_a["s"] @ in_a["b"].T, SCALE * in_b["b"] @ in_b["c"].T
    h = SCALE * await embed(api, "a", codes) @ in_a["d"].T
    for _ in range(200):
        g = g - log_mean_exp(g, axis=0)
        g = g - log_mean_exp(g, axis=1)
    weights = np.exp(f - log_mean_exp(f, axis=1)) @ np.exp(g) / len(texts) @ np.exp(h - log_mean_exp(h, axis=0))
    np.testing.assert_allclose(ratios(rows), np.log(weights / len(codes)), atol=2e-3)
    about = rows[0]["diagnostics"]
    assert about["path"] == ["state", "text", "code", "text"]
    assert (about["method"], about["through"], about["bridge_size"]) == ("marginal", None, 5)
    assert "3 legs that meet in text, code; several bridges" in about["reason"]
    assert about["standard_error"] > 0
    assert 1 <= about["effective_sample_size"] <= 5
    assert sum(each["posterior"] for each in rows[0]["matches"]) == pytest.approx(1, abs=1e-4)


async def test_a_chain_over_banks_says_how_far_it_can_be_trusted_and_stays_the_same(api: Any) -> None:
    rows, again = [await ask(api, **LONG) for _ in range(2)]
    assert rows == again  # the second one finds the offsets of the inner leg
    for row in rows:
        assert row["diagnostics"]["normalised"]
        assert row["diagnostics"]["bridge_size"] == 96
        assert row["diagnostics"]["bias"] is not None
        if not row["diagnostics"]["value_trusted"]:
            assert row["diagnostics"]["warnings"]
    half = await ask(api, **LONG, through=[{"through": None}, {"through": CODES, "weights": [1, 1, 0, 2]}])
    assert half[0]["diagnostics"]["bridge_size"] == 4


async def test_a_joint_is_what_a_bridge_is(api: Any) -> None:
    plain = await ask(api, **ONE, through=TEXTS, bridge_weights=[1.0] * 9, method="marginal")
    joint = await ask(api, **ONE, through=[{"through": TEXTS}], method="marginal")
    assert plain == joint
    named = await ask(api, **ONE, through=[{"through": "text"}], method="marginal")
    assert named == await ask(api, **ONE, through="text", method="marginal")


async def test_weights_count_items_as_repeating_them_does(api: Any) -> None:
    weighed = await ask(api, **ONE, through=TEXTS[:3], bridge_weights=[2, 0, 6])
    repeated = await ask(api, **ONE, through=[TEXTS[0], TEXTS[2], TEXTS[2], TEXTS[2]])
    np.testing.assert_allclose(ratios(weighed), ratios(repeated), atol=1e-4)
    assert weighed[0]["diagnostics"]["bridge_size"] == 3


async def test_the_closed_form_of_the_sphere_needs_no_bridge(api: Any) -> None:
    from worker.composition.closed_forms import sphere

    rows = await ask(api, **ONE, method="analytic")
    import torch

    a, c = [torch.from_numpy(await embed(api, "a", items)) for items in (STATES, CODES)]
    np.testing.assert_allclose(ratios(rows), sphere(a, c, (SCALE, SCALE), normalise=True), atol=1e-4)
    about = rows[0]["diagnostics"]
    assert (about["method"], about["effective_sample_size"], about["standard_error"]) == ("analytic", None, None)
    assert about["value_trusted"] == (about["bridge_resultant"] <= 0.1)
    assert bool(about["warnings"]) != about["value_trusted"]
    bare = await ask(api, **ONE | {"model": "bare"}, method="analytic")
    np.testing.assert_allclose(ratios(bare), ratios(rows), atol=1e-6)
    assert "nothing tells" in bare[0]["diagnostics"]["warnings"][0]


async def test_the_closed_form_of_a_normal_bridge_takes_its_moments_from_the_bank(api: Any) -> None:
    rows = await ask(api, **ONE | {"model": "far"}, method="analytic")
    assert rows[0]["diagnostics"]["method"] == "analytic"
    assert rows[0]["diagnostics"]["bridge_size"] == 96
    summed = await ask(api, **ONE | {"model": "far"}, method="marginal")
    assert np.corrcoef(ratios(rows).ravel(), ratios(summed).ravel())[0, 1] > 0.5


async def test_auto_tells_what_it_saw(api: Any) -> None:
    healthy = (await ask(api, **ONE))[0]["diagnostics"]
    assert healthy["method"] == "marginal"
    assert "both were trained with text; the bridge carries the sum" in healthy["reason"]
    weak = (await ask(api, **ONE | {"model": "sharp"}))[0]["diagnostics"]
    assert "few bridge items carry the sum" in weak["reason"]
    assert not weak["value_trusted"]
    assert weak["warnings"]
    weighed = (await ask(api, **ONE | {"model": "sharp"}, prior=[1, 1, 1, 1]))[0]["diagnostics"]
    assert weighed["method"] == "marginal"
    assert "prior" in weighed["reason"]
    apart = [CHAIN[0], CHAIN[1]]
    assert "differently" in (await ask(api, legs=apart, source=STATES, target=CODES))[0]["diagnostics"]["reason"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (LONG | {"through": TEXTS}, "through", "list of joints"),
        (LONG | {"through": [{"through": TEXTS}]}, "through", "1 bridges for 2 joints"),
        (LONG | {"through": [{"through": None}, {"through": "image"}]}, "through[1].through", "meet in code"),
        (LONG | {"through": [{"through": CODES}, {"through": None}]}, "through[0].through[0]", "this is code"),
        (
            LONG | {"through": [{"through": TEXTS, "weights": [1]}, {"through": None}]},
            "through[0].weights",
            "1 weights",
        ),
        (LONG | {"through": [{"through": None, "weights": [1]}] * 2}, "through[0].weights", "drawn from p(b)"),
        (LONG | {"bridge_weights": [1, 2]}, "bridge_weights", "list of joints"),
        (LONG | {"method": "analytic"}, "method", "several"),
        (LONG | {"method": "direct"}, "method", "differently"),
        (LONG | {"legs": [CHAIN[0], CHAIN[2], CHAIN[1]]}, "legs[1].from", "do not meet"),
        (LONG | {"target": CODES}, "legs[2].to", "code"),
        (ONE | {"method": "marginal", "target": TEXTS}, "model", "trained"),
        (ONE | {"method": "analytic", "model": "dot"}, "method", "not for inner products"),
        (
            {"legs": CHAIN[:2], "source": STATES, "target": CODES, "method": "analytic"},
            "method",
            "encode 'text' differently",
        ),
        ({"legs": CHAIN[:1], "source": STATES, "target": TEXTS, "method": "analytic"}, "method", "there is one"),
        (ONE | {"through": TEXTS, "bridge_weights": [1] * 8}, "bridge_weights", "8 weights for 9 bridge items"),
        (ONE | {"through": TEXTS, "bridge_weights": [0] * 9}, "bridge_weights", "zero"),
        (ONE | {"through": TEXTS, "bridge_weights": [-1] * 9}, "bridge_weights[0]", "greater than or equal"),
        (ONE | {"bridge_weights": [1] * 9}, "bridge_weights", "drawn from p(b)"),
        (ONE | {"method": "direct", "bridge_weights": [1] * 9}, "bridge_weights", "no bridge"),
        (
            ONE | {"through": [{"through": TEXTS}], "bridge_weights": [1] * 9},
            "bridge_weights",
            "stand in the joints",
        ),
        (ONE | {"method": "exact"}, "method", "analytic"),
    ],
)
async def test_what_cannot_be_composed_is_refused_with_the_reason(
    api: Any, body: dict[str, Any], param: str, words: str
) -> None:
    response = await api.post("/v1/compose", json=body)
    error = response.json()["error"]
    assert response.status_code == 422, response.text
    assert (error["param"] or "").startswith(param)
    assert words in error["message"]
