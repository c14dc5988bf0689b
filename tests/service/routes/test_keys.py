from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract.jobs import IngestArgs
from service.contract.queue import enqueue
from service.contract.tables import api_key, dataset, embedding_set, model
from service.keys import CreateKey, create_key, hash_key

pytestmark = pytest.mark.anyio


def key_for(api: Any, tenant: str = "default", **changes: Any) -> str:
    wanted = CreateKey.model_validate({"name": "k", "scopes": ["admin"]} | changes)
    with api.service.database.engine.begin() as conn:
        _, key = create_key(conn, tenant, wanted)
    api.service.keys.forget()
    return key


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_is_shown_once_and_kept_as_a_hash(api: Any) -> None:
    created = await api.post("/v1/keys", json={"name": "ci", "scopes": ["read", "infer"]})
    assert created.status_code == 201
    secret, key_id = created.json()["secret"], created.json()["key"]["id"]
    assert re.match(r"^isk_[0-9a-z]{32}$", secret)
    with api.service.database.engine.connect() as conn:
        row = conn.execute(sa.select(api_key)).one()
    assert row.hash == hash_key(secret)
    assert secret not in str(row)
    # From now on a key is needed, and this one cannot make others.
    assert (await api.get("/v1/keys")).status_code == 401
    assert (await api.get("/v1/keys", headers=bearer(secret))).status_code == 403
    assert (await api.get("/v1/jobs", headers=bearer(secret))).status_code == 200
    admin = key_for(api)
    listed = await api.get("/v1/keys", headers=bearer(admin))
    assert secret not in listed.text
    assert len(listed.json()["data"]) == 2
    revoked = await api.client.delete(f"/v1/keys/{key_id}", headers=bearer(admin))
    assert revoked.json()["deleted"]
    assert (await api.get("/v1/jobs", headers=bearer(secret))).status_code == 401
    assert (await api.client.delete("/v1/keys/key_none", headers=bearer(admin))).status_code == 404


async def test_when_a_key_was_last_used_is_noted_beside_the_requests(api: Any) -> None:
    key_for(api, name="idle")
    admin = key_for(api, name="busy")
    began = datetime.now(UTC) - timedelta(seconds=1)
    for _ in range(3):
        assert (await api.get("/v1/limits", headers=bearer(admin))).status_code == 200
    await api.service.keys.close()
    listed = (await api.get("/v1/keys", headers=bearer(admin))).json()["data"]
    used = {entry["name"]: entry["last_used_at"] for entry in listed}
    assert used["idle"] is None
    noted = datetime.fromisoformat(used["busy"])
    assert began <= noted <= datetime.now(UTC) + timedelta(seconds=1)
    api.service.keys.forget()  # like another process
    await api.get("/v1/limits", headers=bearer(admin))
    await api.service.keys.close()
    listed = (await api.get("/v1/keys", headers=bearer(admin))).json()["data"]
    assert datetime.fromisoformat(listed[0]["last_used_at"]) == noted  # it was noted within this minute


async def test_whatever_is_wrong_with_a_key_the_answer_is_the_same(small: Any) -> None:
    good = key_for(small)
    expired = key_for(small, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    headers = [
        {"authorization": "Basic abc"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {good} "},
        {"authorization": "Bearer isk_" + "0" * 32},
        {"authorization": "Bearer " + "x" * 1_000_000},
        {"authorization": b"Bearer \xff\x00"},
        bearer(expired),
    ]
    answers = [await small.get("/v1/jobs", headers=each) for each in headers]
    assert {each.status_code for each in answers} == {401}
    assert len({each.text for each in answers}) == 1
    assert {each.headers["www-authenticate"] for each in answers} == {"Bearer"}
    assert (await small.get("/v1/jobs")).status_code == 401
    assert (await small.get(f"/v1/jobs?api_key={good}")).status_code == 401
    assert (await small.get("/v1/jobs", headers=bearer(good))).status_code == 200
    for probe in ("/healthz", "/readyz", "/metrics"):
        assert (await small.get(probe)).status_code == 200


async def test_no_body_is_read_for_an_unknown_caller(small: Any) -> None:
    key_for(small)

    async def never() -> Any:
        pytest.fail("the body was read")
        yield b""

    response = await small.post("/v1/jobs", content=never(), headers={"content-type": "application/json"})
    assert response.status_code == 401


@pytest.mark.parametrize(
    ("scope", "method", "path"),
    [
        ("read", "GET", "/v1/jobs"),
        ("read", "GET", "/v1/limits"),
        ("write", "DELETE", "/v1/models/m"),
        ("write", "POST", "/v1/jobs/job_a/cancel"),
        ("infer", "POST", "/v1/embeddings"),
        ("admin", "GET", "/v1/keys"),
    ],
)
async def test_a_key_does_what_its_scopes_say(small: Any, scope: str, method: str, path: str) -> None:
    others = [each for each in ("read", "write", "infer") if each != scope]
    options: dict[str, Any] = {"json": {"model": "m", "input": "a"}} if path.endswith("embeddings") else {}
    refused = await small.client.request(method, path, headers=bearer(key_for(small, scopes=others)), **options)
    assert refused.status_code == 403
    for enough in ([scope], ["admin"]):
        taken = await small.client.request(method, path, headers=bearer(key_for(small, scopes=enough)), **options)
        assert taken.status_code in {200, 404}


async def test_over_its_rate_a_key_waits(small: Any) -> None:
    key = key_for(small, requests_per_minute=3)
    answers = [await small.get("/v1/jobs", headers=bearer(key)) for _ in range(5)]
    assert [each.status_code for each in answers] == [200, 200, 200, 429, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
    assert (await small.get("/v1/jobs", headers=bearer(key_for(small)))).status_code == 200


async def test_requests_that_come_together_share_their_keys_rate(small: Any) -> None:
    headers = bearer(key_for(small, requests_per_minute=3))
    answers = await asyncio.gather(*(small.get("/v1/limits", headers=headers) for _ in range(8)))
    assert sorted(each.status_code for each in answers) == [200] * 3 + [429] * 5


async def test_an_open_service_answers_this_machine_only(small: Any) -> None:
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert (await small.get("/v1/jobs", headers={"host": host})).status_code == 200
    for host in ("rebound.example", "127.0.0.1.example", "[", "a:b", ""):
        assert (await small.get("/v1/jobs", headers={"host": host})).status_code == 403, host
    for origin in ("https://evil.example", "null", "http://[", "http://localhost@evil.example"):
        assert (await small.get("/v1/jobs", headers={"origin": origin})).status_code == 403, origin
    assert (await small.get("/v1/jobs", headers={"origin": "http://localhost:3000"})).status_code == 200


async def test_a_bind_that_others_reach_needs_a_key_or_a_word(start: Any, sqlite_template: Any, tmp_path: Any) -> None:
    path = tmp_path / "bind.db"
    path.write_bytes(sqlite_template.read_bytes())
    url = f"sqlite:///{path}"
    with pytest.raises(RuntimeError, match="isthmus keys create"):
        async with start(url, host="0.0.0.0"):
            pass
    async with start(url, host="0.0.0.0", insecure=True) as api:
        assert (await api.get("/v1/jobs", headers={"host": "far.example"})).status_code == 200
        key = key_for(api)
    async with start(url, host="0.0.0.0") as api:
        assert (await api.get("/v1/jobs")).status_code == 401
        assert (await api.get("/v1/jobs", headers=bearer(key) | {"host": "far.example"})).status_code == 200


async def test_a_key_from_the_settings_is_there_from_the_first_start(start: Any, database_url: str) -> None:
    key = "isk_" + "0123456789abcdef" * 2
    for _ in range(2):  # a second start finds it
        async with start(database_url, host="0.0.0.0", api_key=key) as api:
            assert (await api.get("/v1/models")).status_code == 401
            listed = await api.get("/v1/keys", headers={"authorization": f"Bearer {key}"})
            assert [entry["name"] for entry in listed.json()["data"]] == ["ISTHMUS_API_KEY"]
    with pytest.raises(RuntimeError, match="is not a key"):
        async with start(database_url, api_key="hunter2"):
            pass


async def test_another_tenants_things_are_answered_like_unknown_ones(api: Any) -> None:
    with api.service.database.engine.begin() as conn:
        theirs = {"tenant_id": "other", "artifact": "x/y"}
        conn.execute(sa.insert(dataset).values(id="ds_b", tenant_id="other", name="n", source="s"))
        args = IngestArgs(dataset="ds_b", source="s")
        job_id = enqueue(conn, tenant="other", args=args)
        info = {"modalities": [], "dimensions": 1, "logit_scales": {}, "metrics": {}, "num_bytes": 1}
        conn.execute(sa.insert(model).values(id="model_b", **theirs, digest="d", info=info))
        conn.execute(sa.insert(embedding_set).values(id="emb_b", **theirs, info={}, job_id=job_id))
    key_b = key_for(api, "other")
    mine = bearer(key_for(api, "default"))
    key_id = (await api.get("/v1/keys", headers=bearer(key_b))).json()["data"][0]["id"]
    known = {"job_id": job_id, "dataset_id": "ds_b", "name": "model_b", "set_id": "emb_b", "key_id": key_id}
    bodies: dict[str, Any] = {"PATCH": {"json": {"aliases": ["a"]}}}
    for path, methods in api.client._transport.app.openapi()["paths"].items():
        if "{" not in path:
            continue
        for method in (each.upper() for each in methods):
            real = path.format(**known, path="x")
            fake = path.format(**{name: f"{value[:3]}_unknown" for name, value in known.items()}, path="x")
            answers = [
                await api.client.request(method, each, headers=mine, **bodies.get(method, {})) for each in (real, fake)
            ]
            assert [each.status_code for each in answers] == [404, 404], (method, path)
            first, second = (each.json()["error"] for each in answers)
            assert first["code"] == second["code"]
            assert first["message"].replace(real, "") == first["message"]
    for path in ("/v1/jobs", "/v1/datasets", "/v1/models", "/v1/embedding-sets"):
        assert (await api.get(path, headers=mine)).json()["data"] == []
    cursors = {"/v1/jobs": job_id, "/v1/datasets": "ds_b", "/v1/models": "model_b"}
    for path, cursor in cursors.items():
        assert (await api.get(f"{path}?after={cursor}", headers=mine)).status_code == 400
    assert (await api.get(f"/v1/jobs/{job_id}", headers=bearer(key_b))).status_code == 200
