"""How to compose what was never paired, asked of a real inference process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from service.contract.artifacts import open_store
from service.contract.diagnostics import ModelComposition, ModelCompositionList

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from service.contract.wire import ModelRef

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, publish_model: Any, run_inference: Any
) -> Iterator[tuple[Path, str, dict[str, ModelRef]]]:
    folder = tmp_path_factory.mktemp("served")
    store = open_store(str(folder / "store"))
    dot = {"kind": "info_nce", "critic": "dot"}
    models = {
        "cosine": publish_model(store, "models/model_cosine/1", seed=1),
        "none": publish_model(store, "models/model_none/1", seed=3, keep="none"),
        "dot": publish_model(store, "models/model_dot/1", seed=1, loss=dot),
        "distance": publish_model(store, "models/model_distance/1", seed=1, loss=dot | {"critic": "squared_distance"}),
        "square": publish_model(store, "models/model_square/1", seed=6, loss={"kind": "square"}),
    }
    endpoint = f"unix:{folder / 's'}"
    with run_inference(folder / "store", endpoint):
        yield folder / "store", endpoint, models


@pytest.fixture
async def api(start_served: Any, served: Any) -> AsyncIterator[Any]:
    async with start_served(*served) as running:
        yield running


async def ask(api: Any, name: str, query: str = "") -> list[ModelComposition]:
    response = await api.get(f"/v1/models/{name}/composition{query}")
    assert response.status_code == 200, response.text
    return ModelCompositionList.model_validate_json(response.content).data


async def test_every_ordered_pair_that_was_never_trained_is_there(api: Any) -> None:
    found = await ask(api, "cosine")
    assert [(each.from_, each.to, each.through) for each in found] == [
        (first, second, "text")
        for first in ("code", "image", "state")
        for second in ("code", "image", "state")
        if first != second
    ]
    for each in found:
        assert (each.object, each.critic) == ("model.composition", "cosine")
        known = each.diagnostics
        assert known is not None
        assert (each.method, each.reason) == (known.method, known.reason)
        assert (known.first.end, known.second.end) == (each.from_, each.to)
        assert known.sphere is not None
        assert known.normal is None
        assert 0 <= known.sphere.resultant <= 1
        assert 1 <= known.sum.effective_sample_size <= known.bridge_size
    assert (await ask(api, "cosine", "?from=code"))[0] == found[0]
    assert [each.from_ for each in await ask(api, "cosine", "?to=code")] == ["image", "state"]
    assert await ask(api, "cosine", "?from=image&to=state") == [found[3]]


async def test_a_model_is_asked_about_once(api: Any) -> None:
    await ask(api, "cosine")
    calls = api.service.gateway.num_calls
    await ask(api, "cosine")
    assert api.service.gateway.num_calls == calls


async def test_the_method_is_the_one_that_the_rule_of_composition_chooses(api: Any) -> None:
    for each in await ask(api, "dot", "?from=code"):
        assert each.method == "marginal"
        assert "inner products" in each.reason
        assert each.diagnostics is not None
        assert each.diagnostics.normal is not None
    (each,) = await ask(api, "distance", "?from=code&to=image")
    assert each.diagnostics is not None
    assert each.diagnostics.normal is not None
    assert each.diagnostics.sphere is None


async def test_without_banks_a_list_says_what_would_help_and_a_pair_is_refused(api: Any) -> None:
    found = await ask(api, "none")
    assert len(found) == 6
    for each in found:
        assert (each.through, each.method, each.diagnostics) == ("text", None, None)
        assert "given items of text" in each.reason
    response = await api.get("/v1/models/none/composition?from=code&to=image")
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "no_bank"


async def test_what_was_trained_by_regression_is_compared_and_never_summed(api: Any) -> None:
    """The list, a pair by name, and what compose does where the method is left open, say the same."""
    found = await ask(api, "square")
    assert len(found) == 6
    assert found[1] in await ask(api, "square", f"?from={found[1].from_}&to={found[1].to}")
    for each in found:
        assert (each.through, each.method, each.diagnostics) == ("text", "direct", None)
        assert "regression" in each.reason
    question = {
        "model": "square",
        "source": [{"modality": "code", "tokens": [3, 4]}],
        "target": [{"modality": "state", "tokens": [[0.1, 1.0, 2.0]]}, {"modality": "state", "tokens": [[1, 0, 2]]}],
    }
    answer = await api.post("/v1/compose", json=question)
    assert answer.status_code == 200, answer.text
    diagnostics = answer.json()["data"][0]["diagnostics"]
    assert diagnostics["method"] == "direct"
    assert "regression" in diagnostics["reason"]
    for method in ("marginal", "analytic"):
        refused = await api.post("/v1/compose", json=question | {"method": method})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_ratio")
    legs = [{"model": "square", "from": "code", "to": "text"}, {"model": "cosine", "from": "text", "to": "state"}]
    apart = await api.post("/v1/compose", json=question | {"model": None, "legs": legs})
    assert (apart.status_code, apart.json()["error"]["param"]) == (422, "legs")


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ("?from=smell", 404, "modality_not_found", "from"),
        ("?from=code&to=smell", 404, "modality_not_found", "to"),
        ("?from=code&to=text", 422, "pair_trained", "to"),
        ("?from=code&to=code", 422, None, "to"),
    ],
)
async def test_bad_questions_are_refused(api: Any, query: str, status: int, code: str | None, param: str) -> None:
    response = await api.get(f"/v1/models/cosine/composition{query}")
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code or error["code"], param)


async def test_a_model_of_somebody_else_is_not_there(api: Any, served: Any) -> None:
    """Not even where its equal is known already."""
    await ask(api, "cosine")
    api.add_model("model_foreign", served[2]["cosine"], name="foreign", tenant="somebody")
    for name in ("model_x", "model_foreign", "foreign"):
        assert (await api.get(f"/v1/models/{name}/composition")).status_code == 404
