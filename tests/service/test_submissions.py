"""Training that starts from a model, as it is submitted: what can be known is refused then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract.recipe import Recipe
from service.contract.tables import alias, dataset
from service.contract.wire import ModelRef

pytestmark = pytest.mark.anyio

JOBS = "/v1/jobs"
DOCUMENT: dict[str, Any] = {
    "towers": {
        "image": {"tokens": {"kind": "image", "size": 8, "patch": 4}},
        "text": {"tokens": {"kind": "text"}, "preset": "tiny"},
    },
    "pairs": [{"dataset": "ds_a", "modalities": ["image", "text"]}],
}


@pytest.fixture
async def ready(api: Any, tmp_path: Path) -> Any:
    """The application with a data set and a model of `DOCUMENT` called `first`."""
    info = {"modalities": {"image": "image", "text": "text"}}
    row = {
        "id": "ds_a",
        "tenant_id": "default",
        "name": "n",
        "source": "s",
        "state": "ready",
        "artifact": "datasets/a/1",
    }
    with api.service.database.engine.begin() as conn:
        conn.execute(sa.insert(dataset).values(**row, digest="d", info=info))
    add_model(api, tmp_path, "model_first", name="first")
    return api


def add_model(api: Any, tmp_path: Path, model_id: str, **options: Any) -> None:
    from service.contract.modality import TextTokens
    from service.contract.tokens import text

    recipe = Recipe.model_validate(DOCUMENT)
    folder = tmp_path / model_id
    (folder / "tokenizers").mkdir(parents=True)
    (folder / "tokenizers" / "text.json").write_bytes(text.train([], TextTokens())[text.FILE])
    body = {
        "recipe": recipe.model_dump(mode="json"),
        "modalities": {name: tower.tokens.model_dump(mode="json") for name, tower in recipe.towers.items()},
        "dimensions": 64,
        "logit_scales": {"image+text": 10.0},
        "pairs": [["image", "text"]],
        "data": {},
    }
    key = f"models/{model_id}/1"
    manifest = api.service.store.publish(folder, key, kind="model", id=model_id, body=body)
    api.add_model(model_id, ModelRef(artifact=key, digest=manifest.digest), **options)


def starting(
    model: str = "first", *, dimensions: int = 64, modality: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Return a submission whose text tower starts from a model."""
    init_from = {"model": model} | ({"modality": modality} if modality else {})
    text = DOCUMENT["towers"]["text"] | {"init_from": init_from} | fields
    recipe = DOCUMENT | {"towers": DOCUMENT["towers"] | {"text": text}, "dimensions": dimensions}
    return {"kind": "train", "recipe": recipe}


async def test_a_tower_that_fits_is_taken_by_id_and_by_alias(ready: Any) -> None:
    for body in (starting(), starting("model_first", locked=True), starting(dimensions=32, lora={"rank": 4})):
        response = await ready.post(JOBS, json=body)
        assert response.status_code == 202, response.text


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (starting("nobody"), 404, "recipe.towers.text.init_from.model", "there is no model nobody"),
        (starting("job_x@latest"), 404, "recipe.towers.text.init_from.model", "there is no model job_x@latest"),
        (starting(modality="sound"), 422, "recipe.towers.text.init_from.modality", "it has image, text"),
        (starting(width=32), 422, "recipe.towers.text", "width is 32 here and 64 in the model"),
        (starting(modality="image"), 422, "recipe.towers.text", "tokens.kind is text here and image in"),
        (starting(locked=True, dimensions=32), 422, "recipe.towers.text", "dimensions is 32 here and 64 in"),
    ],
)
async def test_a_tower_that_does_not_fit_is_refused_now(
    ready: Any, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = await ready.post(JOBS, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert (await ready.get(JOBS)).json()["data"] == []


async def test_another_tenants_model_does_not_exist(ready: Any, tmp_path: Path) -> None:
    add_model(ready, tmp_path, "model_theirs", name="theirs", tenant="other")
    for name in ("model_theirs", "theirs"):
        response = await ready.post(JOBS, json=starting(name))
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


async def test_a_model_that_a_waiting_job_starts_from_cannot_be_deleted(ready: Any) -> None:
    job_id = (await ready.post(JOBS, json=starting())).json()["id"]
    refused = await ready.client.delete("/v1/models/first")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_in_use")
    await ready.post(f"{JOBS}/{job_id}/cancel")
    assert (await ready.client.delete("/v1/models/first")).status_code == 200


async def test_a_repeated_submission_gets_its_first_answer_though_the_model_has_gone(ready: Any) -> None:
    headers = {"idempotency-key": "k"}
    first = await ready.post(JOBS, json=starting(), headers=headers)
    with ready.service.database.engine.begin() as conn:
        conn.execute(sa.delete(alias))
    ready.service.catalogue.forget("default")
    again = await ready.post(JOBS, json=starting(), headers=headers)
    assert (again.status_code, again.json()) == (202, first.json())
