from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa

from service.app import create_app
from service.contract.settings import Settings
from service.examples import REQUESTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

EMBED = "/v1/embeddings"
JOBS = "/v1/jobs"
JSON = {"content-type": "application/json"}
OPENAPI = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"
TRAIN: dict[str, Any] = {
    "kind": "train",
    "recipe": {
        "towers": {
            "image": {"tokens": {"kind": "image", "size": 8, "patch": 4}},
            "text": {"tokens": {"kind": "text"}},
        },
        "pairs": [{"dataset": "ds_x", "modalities": ["image", "text"]}],
    },
}


def check_envelope(response: httpx.Response) -> None:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)
    assert len(response.content) <= 4096
    assert response.headers["x-request-id"]
    assert response.headers["cache-control"] == "no-store"


def embed(**changes: Any) -> bytes:
    return json.dumps({"model": "m", "input": ["a"]} | changes).encode()


def train(**recipe: Any) -> bytes:
    return json.dumps(TRAIN | {"recipe": TRAIN["recipe"] | recipe}).encode()


BODIES: list[tuple[str, str, bytes, int]] = [
    ("empty body", EMBED, b"", 422),
    ("truncated", EMBED, b'{"model": "m", "inp', 400),
    ("not UTF-8", EMBED, b'{"model": "\xff\xfe"}', 400),
    ("UTF-16", EMBED, '{"model": "m", "input": "a"}'.encode("utf-16"), 400),
    ("nested 60,000 deep", EMBED, b"[" * 60_000, 400),
    ("nested in metadata", JOBS, json.dumps({**TRAIN, "metadata": {"a": {"b": {}}}}).encode(), 422),
    ("nested 900 deep", JOBS, b'{"kind": "train", "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 901, 422),
    ("5,000 digits", EMBED, b'{"model": "m", "input": ' + b"9" * 5000 + b"}", 400),
    ("NaN", EMBED, b'{"model": "m", "input": [{"modality": "a", "embedding": [NaN]}]}', 400),
    ("Infinity", EMBED, b'{"model": "m", "input": [{"modality": "a", "embedding": [-Infinity]}]}', 400),
    ("1e999", EMBED, b'{"model": "m", "input": [{"modality": "a", "embedding": [1e999]}]}', 400),
    ("lone surrogate", EMBED, b'{"model": "m", "input": ["\\ud800"]}', 400),
    ("lone surrogate in a key", EMBED, b'{"model": "m", "\\udfff": 1}', 400),
    ("NUL in text", EMBED, b'{"model": "m", "input": ["a\\u0000b"]}', 422),
    ("NUL in metadata", JOBS, json.dumps({**TRAIN, "metadata": {"a": "\0"}}).encode(), 422),
    ("beyond int64", JOBS, train(seed=2**63), 422),
    ("beyond float64", JOBS, train(optimiser={"learning_rate": 10**400}), 422),
    ("a key twice", EMBED, b'{"model": "m", "model": "n", "input": "a"}', 400),
    ("unknown field", EMBED, embed(is_admin=True), 422),
    ("unknown field of a job", JOBS, json.dumps({**TRAIN, "tenant_id": "other"}).encode(), 422),
    ("a bool for an int", EMBED, embed(dimensions=True), 422),
    ("a string for an int", JOBS, train(dimensions="1e3"), 422),
    ("a large wrong value", EMBED, embed(input=3, user=["x" * 100_000]), 422),
    ("a large wrong tag", JOBS, json.dumps({"kind": "x" * 100_000}).encode(), 422),
    ("a large unknown field", EMBED, embed(**{"x" * 100_000: 1}), 422),
    ("empty list", EMBED, embed(input=[]), 422),
    ("nothing but types", EMBED, embed(input=None), 422),
    ("90,000 wrong items", EMBED, embed(input=[3.5] * 30_000), 422),
    ("dimensions 0", EMBED, embed(dimensions=0), 422),
    ("dimensions -1", EMBED, embed(dimensions=-1), 422),
    ("unknown model", EMBED, embed(model="nobody"), 404),
    ("a path for a model", EMBED, embed(model="../../etc/passwd"), 422),
    ("top_k 0", "/v1/classify", json.dumps({"model": "m", "input": "a", "labels": ["b"], "top_k": 0}).encode(), 422),
    ("priority 99", JOBS, json.dumps({**TRAIN, "priority": 99}).encode(), 422),
    ("year 9999", JOBS, json.dumps({**TRAIN, "run_at": "9999-12-31T00:00:00Z"}).encode(), 422),
    ("year 1900", JOBS, json.dumps({**TRAIN, "run_at": "1900-01-01T00:00:00Z"}).encode(), 422),
    ("no zone", JOBS, json.dumps({**TRAIN, "run_at": "2026-01-01T00:00:00"}).encode(), 422),
    ("a budget beyond all limits", JOBS, train(budget={"steps": 10**9}), 422),
    ("a place that is none", "/v1/datasets", b'{"name": "a", "uri": "ftp://host/x"}', 422),
    ("a learning rate of 0", JOBS, train(optimiser={"learning_rate": 0}), 422),
    ("a learning rate of NaN", JOBS, train(optimiser={"learning_rate": "nan"}), 422),
    ("a batch of 0", JOBS, train(budget={"batch_size": 0}), 422),
    ("an object of 15,000 keys", EMBED, b"{" + b",".join(b'"%d":1' % i for i in range(15_000)) + b"}", 400),
    ("a top-level list", EMBED, b"[1, 2]", 422),
    ("a top-level number", JOBS, b"1", 422),
    ("null", EMBED, b"null", 422),
]


@pytest.mark.parametrize(("path", "body", "status"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
async def test_a_hostile_body_gets_its_status_and_the_envelope(
    shared: Any, path: str, body: bytes, status: int
) -> None:
    response = await shared.post(path, content=body, headers=JSON)
    assert response.status_code == status, response.text
    check_envelope(response)
    assert "x" * 1000 not in response.text


HEADERS: list[tuple[str, str, str, dict[str, Any], int]] = [
    ("a huge id", "GET", f"/v1/jobs/{10**40}", {}, 404),
    ("NUL in a path", "GET", "/v1/jobs/%00", {}, 404),
    ("dots in a path", "GET", "/v1/jobs/%2e%2e", {}, 404),
    ("a slash in a path", "GET", "/v1/jobs/a%2fb", {}, 404),
    ("not UTF-8 in a path", "GET", "/v1/models/%ff", {}, 404),
    ("text/plain", "POST", EMBED, {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
    ("no content-type", "POST", EMBED, {"content": b"{}"}, 415),
    ("a form", "POST", JOBS, {"data": {"kind": "train"}}, 415),
    ("gzip", "POST", EMBED, {"content": b"\x1f\x8b", "headers": JSON | {"content-encoding": "gzip"}}, 415),
    ("a length above the limit", "POST", EMBED, {"content": b"1" * 300_000, "headers": JSON}, 413),
    ("a length above a job's limit", "POST", JOBS, {"content": b"1" * 2_000_000, "headers": JSON}, 413),
    ("a wrong method", "PUT", EMBED, {}, 405),
    ("no such path", "GET", "/v2/nothing", {}, 404),
    ("a trailing slash", "GET", "/v1/jobs/", {}, 404),
    ("a model with dots", "GET", "/v1/models/..%2f..%2fetc", {}, 404),
    ("a long idempotency key", "POST", JOBS, {"json": TRAIN, "headers": {"idempotency-key": "k" * 10_000}}, 400),
    ("a key with controls", "POST", JOBS, {"json": TRAIN, "headers": {"idempotency-key": "a\tb"}}, 400),
    ("a key that is not ASCII", "POST", JOBS, {"json": TRAIN, "headers": {"idempotency-key": b"k\xe9"}}, 400),
    ("a cursor that is none", "GET", "/v1/jobs?after=job_nobody", {}, 400),
    ("a cursor with quotes", "GET", "/v1/models?after=%27%20or%201%3D1", {}, 400),
    ("a cursor with NUL", "GET", "/v1/datasets?after=%00", {}, 400),
    ("limit 0", "GET", "/v1/jobs?limit=0", {}, 422),
    ("limit -1", "GET", "/v1/jobs?limit=-1", {}, 422),
    ("limit 10^9", "GET", "/v1/models?limit=1000000000", {}, 422),
    ("limit abc", "GET", "/v1/datasets?limit=abc", {}, 422),
    ("an order that is none", "GET", "/v1/jobs?order=random()", {}, 422),
    ("a status that is none", "GET", "/v1/jobs?status=everything", {}, 422),
    ("a name with NUL", "GET", "/v1/jobs?name=%00", {}, 422),
    (
        "no boundary",
        "POST",
        "/v1/datasets",
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        400,
    ),
    (
        "not multipart",
        "POST",
        "/v1/datasets",
        {"content": b"x" * 100, "headers": {"content-type": "multipart/form-data; boundary=b"}},
        400,
    ),
    ("10,000 parts", "POST", "/v1/datasets", {"files": [(f"a{i}", (None, b"x")) for i in range(10_000)]}, 413),
    ("a field of 100 kB", "POST", "/v1/datasets", {"files": [("name", (None, b"x" * 100_000))]}, 413),
    ("no file", "POST", "/v1/datasets", {"files": [("name", (None, b"x"))]}, 422),
    ("a file above the limit", "POST", "/v1/datasets", {"files": [("file", ("a.tar", b"x" * 4_000_000))]}, 413),
    ("a file of another kind", "POST", "/v1/datasets", {"files": [("file", ("a.exe", b"x"))]}, 415),
    ("two files", "POST", "/v1/datasets", {"files": [("file", ("a.tar", b"x")), ("file", ("b.tar", b"x"))]}, 422),
    (
        "a range header of 10,000 ranges",
        "GET",
        "/v1/jobs/x/files/y",
        {"headers": {"range": "bytes=" + "0-," * 2500}},
        404,
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "options", "status"), [row[1:] for row in HEADERS], ids=[r[0] for r in HEADERS]
)
async def test_a_hostile_request_gets_its_status_and_the_envelope(
    shared: Any, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    response = await shared.client.request(method, path, **options)
    assert response.status_code == status, response.text
    check_envelope(response)


async def test_a_body_without_length_is_cut_at_the_limit(shared: Any) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100_000_000:
            sent += 50_000
            yield b"1" * 50_000

    response = await shared.post(EMBED, content=endless(), headers=JSON)
    assert response.status_code == 413
    check_envelope(response)
    assert sent < 1_000_000


async def test_405_names_the_methods_that_are_allowed(shared: Any) -> None:
    response = await shared.client.put(EMBED)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("name", ["%25", "_", "a'%20OR%20'1'='1", "%5C"])
async def test_characters_of_sql_in_filters_are_literal(api: Any, name: str) -> None:
    response = await api.get(f"/v1/jobs?name={name}")
    assert response.status_code == 200
    assert response.json() == {"object": "list", "data": [], "has_more": False}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": [{"image": 5}, "a"]}, "input[0].image"),
        ({"input": ["a", {"tokens": [1]}]}, "input[1].modality"),
        ({"input": [{"image": "x", "bogus": 1}]}, "input[0].bogus"),
        ({"input": ["a", 3.5]}, "input[1]"),
        ({"input": {"text": 5}}, "input.text"),
        ({"input": [{"modality": "x", "tokens": [1, "a"]}]}, "input[0].tokens[1]"),
        ({"input": "a", "modality": 3}, "modality"),
        ({}, "input"),
    ],
)
async def test_an_invalid_item_is_named_by_its_place(shared: Any, body: dict[str, Any], param: str) -> None:
    response = await shared.post(EMBED, json={"model": "m", **body})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param


async def test_a_sane_request_id_is_echoed_and_any_other_replaced(shared: Any) -> None:
    echoed = await shared.get("/healthz", headers={"x-request-id": "abc-1.2:3"})
    assert echoed.headers["x-request-id"] == "abc-1.2:3"
    for bad in ("a b", "x" * 200, "<script>", ""):
        replaced = await shared.get("/healthz", headers={"x-request-id": bad})
        assert replaced.headers["x-request-id"].startswith("req_")
    assert float(echoed.headers["x-total-time"]) >= 0


async def test_a_bug_answers_500_with_the_request_id_and_nothing_else(
    small: Any, caplog: pytest.LogCaptureFixture
) -> None:
    small.service.store = None  # whatever needs it now raises what nobody expected
    with small.service.database.engine.begin() as conn:
        conn.execute(
            sa.text(
                "INSERT INTO embedding_set (id, tenant_id, artifact, info, job_id, created_at) "
                "VALUES ('emb_a', 'default', 'secret/place', '{}', 'job_a', 1)"
            )
        )
    response = await small.get("/v1/embedding-sets/emb_a/files", headers={"x-request-id": "r-1"})
    assert response.status_code == 500
    check_envelope(response)
    assert "r-1" in response.json()["error"]["message"]
    assert "secret" not in response.text
    assert "NoneType" not in response.text
    logged = [record.__dict__["fields"] for record in caplog.records if record.exc_info]
    assert [fields["request_id"] for fields in logged] == ["r-1"]


async def test_without_a_database_everything_that_needs_it_is_503(start: Any, tmp_path: Path) -> None:
    async with start(f"sqlite:///{tmp_path / 'missing' / 'folder' / 'x.db'}") as api:
        alive = await api.get("/healthz")
        assert alive.status_code == 200
        ready = await api.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
        assert "database" in ready.json()["missing"]
        for path in ("/v1/jobs", "/v1/models", "/v1/datasets", "/v1/limits"):
            response = await api.get(path)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            check_envelope(response)


async def test_the_service_stays_open_and_serves_what_it_knows_when_the_database_goes(
    small: Any, tmp_path: Path
) -> None:
    assert (await small.get("/v1/limits")).status_code == 200
    small.service.database.engine.dispose()
    (tmp_path / "small.db").rename(tmp_path / "away.db")
    (tmp_path / "small.db").mkdir()
    small.service.keys._has_key_at = -1e9
    assert (await small.get("/v1/limits")).status_code == 200


async def test_readiness_is_degraded_without_workers_and_says_so(small: Any) -> None:
    response = await small.get("/readyz")
    assert response.status_code == 200
    assert response.json()["status"] == "degraded"
    assert "inference" in response.json()["missing"]
    small.service.draining = True
    assert (await small.get("/readyz")).status_code == 503


async def test_metrics_count_requests_by_route_and_never_by_what_was_sent(small: Any) -> None:
    await small.get("/v1/jobs/job_secret")
    await small.get("/nothing/secret")
    response = await small.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'path="/v1/jobs/{job_id}",status="404"' in response.text
    assert "secret" not in response.text
    assert "isthmus_database_up 1.0" in response.text


def described() -> dict[str, Any]:
    return create_app(Settings(_env_file=None)).openapi()  # pyright: ignore[reportCallIssue]


def test_the_description_in_docs_is_the_applications() -> None:
    text = json.dumps(described(), indent=2, ensure_ascii=False) + "\n"
    assert OPENAPI.read_text(encoding="utf-8") == text, "run `isthmus openapi > docs/openapi.json`"


def test_every_operation_has_an_id_a_summary_a_tag_and_typed_errors() -> None:
    seen: set[str] = set()
    for path, methods in described()["paths"].items():
        for method, operation in methods.items():
            assert operation["operationId"] not in seen
            seen.add(operation["operationId"])
            assert operation["summary"]
            assert operation["description"]
            assert len(operation["tags"]) == 1
            if path.startswith("/v1"):
                assert {"400", "401", "403", "422", "429", "503"} <= set(operation["responses"]), (method, path)
                schema = operation["responses"]["422"]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}


def test_every_operation_that_speaks_json_has_an_example_of_what_it_takes_and_answers() -> None:
    for methods in described()["paths"].values():
        for operation in methods.values():
            request = operation.get("requestBody", {}).get("content", {}).get("application/json")
            assert request is None or "example" in request or "examples" in request, operation["operationId"]
            for status in operation["responses"].keys() & {"200", "201", "202"}:
                answer = operation["responses"][status]["content"].get("application/json")
                assert answer is None or "example" in answer, operation["operationId"]


async def test_the_examples_of_requests_are_taken(shared: Any) -> None:
    paths = {"create_embeddings": EMBED}
    for operation in ("create_embeddings", "tokenize", "classify", "compose"):
        given = REQUESTS[operation]
        for body in given.values() if isinstance(given, dict) else [given]:
            document = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
            response = await shared.post(paths.get(operation, f"/v1/{operation}"), json=document)
            assert response.json()["error"]["code"] == "model_not_found"  # nothing else is wrong with them


def test_a_client_generated_from_the_description_has_no_warnings(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"post_hooks": []}))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", str(OPENAPI)]
    command += ["--config", str(config), "--output-path", str(tmp_path / "client"), "--fail-on-warning"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
