"""Compose jobs as they are submitted: settled, refused with the place, and what they read is kept meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from service.contract.artifacts import open_store
from service.contract.tables import dataset, embedding_set, job_input

if TYPE_CHECKING:
    from pathlib import Path

    from service.contract.wire import ModelRef

pytestmark = pytest.mark.anyio

JOBS = "/v1/jobs"
SETS = {"source": {"embeddings": "emb_states"}, "target": {"embeddings": "emb_codes"}}
ASKED = {"kind": "compose", "model": "a", "name": "mine", **SETS}


@pytest.fixture(scope="module")
def refs(tmp_path_factory: pytest.TempPathFactory, publish_model: Any) -> tuple[Path, dict[str, ModelRef]]:
    folder = tmp_path_factory.mktemp("jobs") / "store"
    store = open_store(str(folder))
    names = {"model_a": {"seed": 1}, "model_b": {"seed": 2, "keep": "none"}}
    return folder, {name: publish_model(store, f"models/{name}/1", **how) for name, how in names.items()}


@pytest.fixture
async def ready(api: Any, refs: Any, tmp_path: Path) -> Any:
    """The application on each database, with models a and b, embedding sets and a data set."""
    folder, models = refs
    (tmp_path / "store").rmdir() if (tmp_path / "store").is_dir() else None
    (tmp_path / "store").symlink_to(folder)
    for model_id, ref in models.items():
        api.add_model(model_id, ref, name=model_id.removeprefix("model_"))
    rows = [
        ("emb_states", "default", "model_a", "state"),
        ("emb_codes", "default", "model_a", "code"),
        ("emb_texts", "default", "model_a", "text"),
        ("emb_b", "default", "model_b", "code"),
        ("emb_foreign", "somebody", "model_a", "code"),
    ]
    with api.service.database.engine.begin() as conn:
        for set_id, tenant, model, modality in rows:
            info = {"model": model, "model_digest": models[model].digest, "modality": modality}
            info |= {"num_vectors": 3, "dimensions": 8, "num_bytes": 96}
            row = {"id": set_id, "tenant_id": tenant, "artifact": f"embeddings/{set_id}/1", "job_id": "job_a"}
            conn.execute(sa.insert(embedding_set).values(**row, info=info))
        data = {"id": "ds_a", "tenant_id": "default", "name": "n", "source": "s", "state": "ready", "digest": "d"}
        info = {"modalities": {"code": "discrete"}}
        conn.execute(sa.insert(dataset).values(**data, artifact="datasets/ds_a/1", info=info))
    return api


async def test_the_way_is_chosen_now_and_written_down(ready: Any) -> None:
    created = await ready.post(JOBS, json=ASKED)
    assert created.status_code == 202, created.text
    job = created.json()
    assert (job["kind"], job["name"], job["status"]) == ("compose", "mine", "queued")
    args = job["args"]
    assert args["legs"] == [
        {"model": "a", "from": "state", "to": "text"},
        {"model": "a", "from": "text", "to": "code"},
    ]
    assert (args["model"], args["method"], args["top_k"]) == (None, "auto", 10)  # the worker looks at the sum
    assert (await ready.get(f"{JOBS}?kind=compose")).json()["data"][0]["id"] == job["id"]
    with ready.service.database.engine.connect() as conn:
        read = set(conn.execute(sa.select(job_input.c.ref)).scalars())
    assert read == {"model_a", "emb_states", "emb_codes"}
    samples = {"dataset": "ds_a", "modality": "code"}
    created = await ready.post(JOBS, json=ASKED | {"target": samples, "method": "direct"})
    assert created.status_code == 202, created.text
    assert created.json()["args"]["target"] == samples | {"split": "all"}


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"source": {"embeddings": "emb_none"}}, 404, "source.embeddings"),
        ({"target": {"embeddings": "emb_foreign"}}, 404, "target.embeddings"),
        ({"target": {"embeddings": "emb_b"}}, 422, "target.embeddings"),
        ({"target": {"dataset": "ds_none", "modality": "code"}}, 404, "target.dataset"),
        ({"target": {"dataset": "ds_a", "modality": "image"}}, 422, "target.modality"),
        ({"target": {"dataset": "ds_a", "modality": "smell"}}, 422, "target.modality"),
        ({"model": "nobody"}, 404, "model"),
        ({"model": None}, 422, "model"),
        ({"through": "image"}, 422, "through"),
        ({"through": {"embeddings": "emb_codes"}}, 422, "through.embeddings"),
        ({"top_k": 0}, 422, "top_k"),
        ({"through": ["a caption"]}, 422, "through"),  # a job carries ids
        ({"through": [{"through": None}, {"through": None}]}, 422, "through"),
        ({"through": [{"through": {"embeddings": "emb_none"}}]}, 404, "through[0].through.embeddings"),
        ({"through": [{"through": [{"embeddings": "emb_codes"}]}]}, 422, "through[0].through[0].embeddings"),
        ({"through": [{"through": {"embeddings": "emb_texts"}, "weights": [1]}]}, 422, "through[0].weights"),
        ({"through": {"embeddings": "emb_texts"}, "bridge_weights": [0, 0, 0]}, 422, "bridge_weights"),
        ({"bridge_weights": [1, 2, 3]}, 422, "bridge_weights"),
        ({"prior": [1, 2]}, 422, "prior"),
        ({"prior": [0, 0, 0]}, 422, "prior"),
        ({"prior": [1, 2, 3], "method": "direct"}, 422, "prior"),
    ],
)  # fmt: skip
async def test_a_job_that_cannot_work_is_refused_now(
    ready: Any, changes: dict[str, Any], status: int, param: str
) -> None:
    refused = await ready.post(JOBS, json=ASKED | changes)
    assert refused.status_code == status, refused.text
    assert refused.json()["error"]["param"] == param


async def test_what_a_job_needs_is_not_deleted_under_it(ready: Any) -> None:
    path = "/v1/embedding-sets/emb_codes"
    bridged = ASKED | {"through": {"embeddings": "emb_texts"}}
    job = (await ready.post(JOBS, json=bridged)).json()["id"]
    for name in ("emb_states", "emb_codes", "emb_texts"):
        refused = await ready.client.delete(f"/v1/embedding-sets/{name}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "embedding_set_in_use")
    assert (await ready.client.delete("/v1/embedding-sets/emb_b")).status_code == 200
    await ready.post(f"{JOBS}/{job}/cancel")
    assert (await ready.client.delete(path)).status_code == 200
    assert (await ready.client.delete(path)).status_code == 404
    assert (await ready.get(path)).status_code == 404
    assert (await ready.post(JOBS, json=ASKED)).status_code == 404
    retried = await ready.post(f"{JOBS}/{job}/retry")  # found out when it is claimed, and said there
    assert retried.status_code in {200, 404}


async def test_a_chain_names_a_bridge_for_each_joint_and_keeps_all_of_them(ready: Any) -> None:
    legs = [{"model": "a", "from": a, "to": b} for a, b in (("state", "text"), ("text", "code"), ("code", "text"))]
    joints = [{"through": {"embeddings": "emb_texts"}, "weights": [1, 2, 3]}, {"through": {"embeddings": "emb_codes"}}]
    asked = {"kind": "compose", "source": SETS["source"], "target": {"embeddings": "emb_texts"}, "legs": legs}
    created = await ready.post(JOBS, json=asked | {"through": joints, "prior": [0.5, 0, 2]})
    assert created.status_code == 202, created.text
    assert [joint["through"] for joint in created.json()["args"]["through"]] == [each["through"] for each in joints]
    for name in ("emb_states", "emb_codes", "emb_texts"):
        assert (await ready.client.delete(f"/v1/embedding-sets/{name}")).status_code == 409
    refused = await ready.post(JOBS, json=asked | {"through": {"embeddings": "emb_texts"}})
    assert refused.json()["error"]["code"] == "bridges"


async def test_a_set_is_deleted_or_needed_and_never_both(ready: Any) -> None:
    asked = [ready.post(JOBS, json=ASKED) for _ in range(6)]
    *jobs, deleted = await asyncio.gather(*asked[:3], ready.client.delete("/v1/embedding-sets/emb_codes"), *asked[3:])
    statuses = sorted({each.status_code for each in [*jobs, deleted]})
    assert set(statuses) <= {200, 202, 404, 409}
    queued = [each for each in [*jobs, deleted] if each.status_code == 202]
    is_there = (await ready.get("/v1/embedding-sets/emb_codes")).status_code == 200
    assert is_there == bool(queued)


async def test_a_twin_has_the_first_answer_though_the_set_is_gone(ready: Any) -> None:
    headers = {"idempotency-key": "once"}
    first = await ready.post(JOBS, json=ASKED, headers=headers)
    await ready.post(f"{JOBS}/{first.json()['id']}/cancel")
    await ready.client.delete("/v1/embedding-sets/emb_codes")
    again = await ready.post(JOBS, json=ASKED, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
