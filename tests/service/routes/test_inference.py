"""Embeddings, tokens, classification and composition against a real inference process."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any

import httpx2
import numpy as np
import openai
import pytest
import sqlalchemy as sa
from PIL import Image

from service.contract.artifacts import open_store
from service.contract.operations import ClassifyResponse, ComposeResponse, EmbeddingsResponse, TokenizeResponse
from service.contract.tables import checkpoint, embedding_set, job, worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from service.contract.wire import ModelRef

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, publish_model: Any, run_inference: Any
) -> Iterator[tuple[Path, str, dict[str, ModelRef]]]:
    """A store with three models, and an inference process on it."""
    folder = tmp_path_factory.mktemp("served")
    store = open_store(str(folder / "store"))
    models = {
        "model_a": publish_model(store, "models/model_a/1", seed=1),
        "model_b": publish_model(store, "models/model_b/1", seed=2),
        "model_c": publish_model(store, "models/model_c/1", seed=3, keep="none"),
    }
    endpoint = f"unix:{folder / 's'}"
    with run_inference(folder / "store", endpoint):
        yield folder / "store", endpoint, models


@pytest.fixture
async def api(start_served: Any, served: Any) -> AsyncIterator[Any]:
    async with start_served(*served, max_items=100, max_tokens=2000) as running:
        yield running


def png(shade: int = 90, size: tuple[int, int] = (9, 8)) -> str:
    out = io.BytesIO()
    Image.new("L", size, shade).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


async def embed(api: Any, items: Any, **more: Any) -> np.ndarray:
    response = await api.post("/v1/embeddings", json={"model": "a", "input": items} | more)
    assert response.status_code == 200, response.text
    EmbeddingsResponse.model_validate_json(response.content)
    return np.array([entry["embedding"] for entry in response.json()["data"]])


async def test_items_of_every_form_become_unit_vectors(api: Any) -> None:
    pixels = base64.b64encode(bytes(64)).decode()
    items = [
        "a caption",
        {"text": "a caption"},
        {"image": png()},
        png(),
        [1, 100, 101, 2],
        {"modality": "state", "tokens": [[0.5, 1, 2.0], [0.0, 0.0, 1.0]]},
        {"modality": "code", "tokens": [3, 4, 5]},
        {"modality": "image", "tensor": {"dtype": "uint8", "shape": [8, 8], "data": pixels}},
    ]
    response = await api.post("/v1/embeddings", json={"model": "a", "input": items})
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["object"], body["model"]) == ("list", "a")
    assert [entry["index"] for entry in body["data"]] == list(range(8))
    assert [entry["modality"] for entry in body["data"]] == [
        "text", "text", "image", "image", "text", "state", "code", "image",
    ]  # fmt: skip
    z = np.array([entry["embedding"] for entry in body["data"]])
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    assert np.allclose(z[0], z[1])
    assert np.allclose(z[2], z[3])
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 20
    for name in ("x-total-time", "x-tokenise-time", "x-queue-time", "x-inference-time"):
        assert float(response.headers[name]) >= 0
    alone = await embed(api, items[5])
    assert np.allclose(alone[0], z[5], atol=1e-5)


async def test_openais_own_client_gets_both_encodings(api: Any) -> None:
    transport = httpx2.ASGITransport(api.client._transport.app)
    async with openai.AsyncOpenAI(
        base_url="http://localhost/v1", api_key="none", http_client=httpx2.AsyncClient(transport=transport)
    ) as client:
        packed = await client.embeddings.create(model="a", input=["one", "two"])
        plain = await client.embeddings.create(model="a", input=["one", "two"], encoding_format="float")
        short = await client.embeddings.create(model="a", input="one", dimensions=3, encoding_format="float")
        assert np.allclose([e.embedding for e in packed.data], [e.embedding for e in plain.data])
        assert len(short.data[0].embedding) == 3
        assert np.isclose(np.linalg.norm(short.data[0].embedding), 1)
        assert {each.id async for each in await client.models.list()} == {"model_a", "model_b", "model_c"}
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="nobody", input="one")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": ["a"], "dimensions": 9}, 422, "dimensions"),
        ({"input": ["x" * 10_000]}, 422, "input[0]"),
        ({"input": ["a"] * 101}, 422, "input"),
        ({"input": ["a" * 25] * 99}, 422, None),
        ({"input": ["a", {"image": "data:image/png;base64,AAAA"}]}, 415, "input[1]"),
        ({"input": ["a", {"image": "!!!"}]}, 422, "input[1].image"),
        ({"input": [{"image": {"url": "http://127.0.0.1/"}}]}, 422, "input[0].image"),
        ({"input": [{"audio": png()}]}, 422, None),
        ({"input": [{"modality": "state", "tokens": [[1.0]]}]}, 422, None),
        ({"input": [{"modality": "code", "tokens": [50]}]}, 422, None),
        ({"input": [{"modality": "text", "embedding": [1.0] * 8}]}, 422, "input[0].embedding"),
        ({"input": "a", "modality": "smell"}, 422, "modality"),
        ({"input": ["a"], "modality": ["text", "text"]}, 422, "modality"),
        ({"input": [[]]}, 422, None),
    ],
)
async def test_what_a_model_cannot_read_is_refused_with_its_place(
    api: Any, body: dict[str, Any], status: int, param: str | None
) -> None:
    response = await api.post("/v1/embeddings", json={"model": "a", **body})
    assert response.status_code == status, response.text
    if param is not None:
        assert response.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("text", ["", " \t\n", "\u200b\u200d", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "a" * 5])
async def test_odd_text_has_one_finite_vector_however_it_is_escaped(api: Any, text: str) -> None:
    body = {"model": "a", "input": [text]}
    found: list[list[float]] = []
    for raw in (json.dumps(body), json.dumps(body, ensure_ascii=False)):
        response = await api.post("/v1/embeddings", content=raw.encode(), headers=JSON)
        assert response.status_code == 200, response.text
        found.append(response.json()["data"][0]["embedding"])
    assert np.isfinite(found).all()
    assert np.allclose(found[0], found[1], atol=1e-6)


async def test_long_text_is_cut_when_asked(api: Any) -> None:
    assert (await embed(api, ["x" * 10_000], truncate=True)).shape == (1, 8)


async def test_tokens_can_be_sent_back(api: Any) -> None:
    items = ["a caption", {"image": png()}, {"modality": "state", "tokens": [[0.5, 1, 2.0]]}]
    response = await api.post("/v1/tokenize", json={"model": "model_a", "input": items})
    TokenizeResponse.model_validate_json(response.content)
    data = response.json()["data"]
    assert [entry["num_tokens"] for entry in data] == [11, 4, 1]
    back = [{"modality": entry["modality"], "tokens": entry["tokens"][0]} for entry in data]
    assert np.allclose(await embed(api, back), await embed(api, items), atol=1e-6)


async def classify(api: Any, **body: Any) -> list[dict[str, Any]]:
    response = await api.post("/v1/classify", json={"model": "a", **body})
    assert response.status_code == 200, response.text
    ClassifyResponse.model_validate_json(response.content)
    return response.json()["data"]


async def test_classification_is_the_softmax_of_scaled_cosines(api: Any) -> None:
    image, prompts = {"image": png(40)}, {"p": ["one", "two"], "q": ["three"]}
    z = await embed(api, [image, "one", "two", "three"])
    f = np.exp(1.5) * z[1:] @ z[0]
    expected = np.array([np.log(np.exp(f[:2]).mean()), f[2]])
    (row,) = await classify(api, input=[image], labels=prompts)
    got = {each["label"]: each for each in row["predictions"]}
    assert np.allclose([got["p"]["logit"], got["q"]["logit"]], expected, atol=1e-4)
    assert np.allclose([got["p"]["score"], got["q"]["score"]], np.exp(expected) / np.exp(expected).sum(), atol=1e-4)
    assert row["prediction"] == row["predictions"][0]["label"] == "pq"[int(expected.argmax())]
    mean = z[1] + z[2]
    (row,) = await classify(api, input=image, labels=prompts, ensemble="embedding")
    got = {each["label"]: each for each in row["predictions"]}
    assert np.isclose(got["p"]["logit"], np.exp(1.5) * z[0] @ mean / np.linalg.norm(mean), atol=1e-4)
    (row,) = await classify(api, input=image, labels=prompts, prior={"p": 1, "q": 3})
    got = {each["label"]: each["score"] for each in row["predictions"]}
    weights = np.exp(expected) * [1, 3]
    assert np.isclose(got["p"], weights[0] / weights.sum(), atol=1e-4)
    (row,) = await classify(api, input=image, labels=prompts, multi_label=True)
    got = {each["label"]: each["score"] for each in row["predictions"]}
    assert np.isclose(got["p"], 1 / (1 + np.exp(expected[1] - expected[0])), atol=1e-4)


async def test_templates_make_the_prompts_and_known_ones_are_not_embedded_again(api: Any) -> None:
    body = {"input": {"image": png()}, "labels": ["one", "two"], "templates": ["a {}", "the {}"], "top_k": 1}
    first = await classify(api, **body)
    misses, calls = api.service.labels.misses, api.service.gateway.num_calls
    assert misses == 4
    assert await classify(api, **body) == first
    assert (api.service.labels.misses, api.service.labels.hits) == (misses, 4)
    assert api.service.gateway.num_calls == calls + 1
    named = {"one": ["a one", "the one"], "two": ["a two", "the two"]}
    assert await classify(api, **(body | {"labels": named, "templates": None})) == first
    assert len(first[0]["predictions"]) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"labels": {"p": [{"image": png()}]}}, "labels"),
        ({"labels": []}, "labels"),
        ({"labels": ["a", "a"]}, "labels"),
        ({"labels": ["a", "b"], "templates": ["no place"]}, "templates[0]"),
        ({"labels": {"p": ["a"]}, "templates": ["{}"]}, "templates"),
        ({"labels": ["a", "b"], "prior": {"c": 1}}, "prior"),
        ({"labels": ["a", "b"], "prior": {"a": 0}}, "prior"),
        ({"labels": ["a"], "multi_label": True}, "labels"),
        ({"labels": {"p": []}}, "labels.p"),
        ({"labels": {"p": ["x" * 1000]}}, "labels.p[0]"),
    ],
)
async def test_labels_that_make_no_question_are_refused(api: Any, body: dict[str, Any], param: str) -> None:
    response = await api.post("/v1/classify", json={"model": "a", "input": {"image": png()}, **body})
    assert response.status_code == 422
    assert response.json()["error"]["param"].startswith(param)
    if "image" in str(body):
        assert "image with text" in response.json()["error"]["message"]


async def test_prompts_are_not_written_out_beyond_the_limits(api: Any) -> None:
    # Two megabytes that would become sixteen gigabytes, and a million labels with a million templates.
    long = {"labels": ["x" * 100_000], "templates": ["{}" * 8000] * 20}
    response = await api.post("/v1/classify", json={"model": "a", "input": {"image": png()}, **long})
    assert response.status_code == 413
    assert response.json()["error"]["param"] == "templates"
    many = {"labels": list(map(str, range(100_000))), "templates": ["{}"] * 100_000}
    response = await api.post("/v1/classify", json={"model": "a", "input": {"image": png()}, **many})
    assert response.status_code == 422
    assert "10000000000 prompts" in response.json()["error"]["message"]


async def compose(api: Any, **body: Any) -> Any:
    response = await api.post("/v1/compose", json={"top_k": 3, **body})
    assert response.status_code == 200, response.text
    ComposeResponse.model_validate_json(response.content)
    return response.json()["data"]


STATES = [{"modality": "state", "tokens": [[float(at), 1.0, -1.0]]} for at in range(3)]
IMAGES = [{"image": png(shade)} for shade in (0, 80, 160, 240)]


async def test_a_trained_pair_is_compared_directly(api: Any) -> None:
    (row,) = await compose(api, model="a", source=IMAGES[0], target=["one", "two", "three"])
    assert row["diagnostics"]["method"] == "direct"
    posteriors = [match["posterior"] for match in row["matches"]]
    assert np.isclose(sum(posteriors), 1, atol=1e-4)
    assert posteriors == sorted(posteriors, reverse=True)
    z = await embed(api, [IMAGES[0], "one", "two", "three"])
    f = np.exp(1.5) * z[1:] @ z[0]
    assert [match["index"] for match in row["matches"]] == np.argsort(-f).tolist()
    assert np.allclose(posteriors, np.sort(np.exp(f) / np.exp(f).sum())[::-1], atol=1e-4)


async def test_modalities_never_paired_meet_through_the_bank(api: Any) -> None:
    rows = await compose(api, model="a", source=STATES, target=IMAGES, top_k=4)
    assert [row["index"] for row in rows] == [0, 1, 2]
    for row in rows:
        about = row["diagnostics"]
        assert (about["method"], about["through"], about["normalised"]) == ("marginal", "text", True)
        assert about["bridge_size"] == 96
        assert about["effective_sample_size"] > 1
        assert np.isclose(sum(match["posterior"] for match in row["matches"]), 1, atol=1e-3)
        assert all(match["standard_error"] is not None for match in row["matches"])
    named = await compose(
        api,
        legs=[{"model": "a", "from": "state", "to": "text"}, {"model": "model_a", "from": "text", "to": "image"}],
        source=STATES,
        target=IMAGES,
        top_k=4,
    )
    assert named[0]["matches"] == rows[0]["matches"]


async def test_vectors_a_given_bridge_and_priors_are_taken(api: Any) -> None:
    z = (await embed(api, IMAGES)).tolist()
    target = [{"modality": "image", "embedding": row} for row in z]
    rows = await compose(api, model="a", source=STATES, target=target, top_k=4)
    again = await compose(api, model="a", source=STATES, target=IMAGES, top_k=4)
    assert np.allclose(
        [match["log_ratio"] for match in rows[0]["matches"]],
        [match["log_ratio"] for match in again[0]["matches"]],
        atol=1e-3,
    )
    given = await compose(api, model="a", source=STATES, target=IMAGES, through=["one", "two", "three"], top_k=4)
    assert given[0]["diagnostics"]["bridge_size"] == 3
    certain = await compose(api, model="a", source=STATES, target=IMAGES, prior=[0, 0, 5, 0], top_k=1)
    assert certain[0]["matches"][0]["index"] == 2
    assert np.isclose(certain[0]["matches"][0]["posterior"], 1)


async def test_models_trained_apart_meet_in_the_modality_they_share(api: Any) -> None:
    legs = [{"model": "a", "from": "state", "to": "text"}, {"model": "b", "from": "text", "to": "image"}]
    rows = await compose(api, legs=legs, source=STATES, target=IMAGES)
    assert rows[0]["diagnostics"]["method"] == "marginal"
    refused = await api.post("/v1/compose", json={"legs": legs, "source": STATES, "target": IMAGES, "method": "direct"})
    assert refused.status_code == 422
    assert "encode" in refused.json()["error"]["message"]


async def test_direct_on_a_pair_never_trained_gives_scores_and_no_ratios(api: Any) -> None:
    (row,) = await compose(api, model="a", source=STATES[0], target=IMAGES, method="direct")
    assert row["diagnostics"]["method"] == "direct"
    assert row["matches"][0]["log_ratio"] is None
    assert row["matches"][0]["posterior"] is None
    assert row["diagnostics"]["warnings"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"model": None}, "model", "either"),
        ({"legs": [{"model": "a", "from": "state", "to": "text"}]}, "model", "either"),
        ({"target": [*IMAGES, "text"]}, "target[4]", "one modality"),
        ({"through": "code"}, "through", "trained: code with text"),
        ({"through": "smell"}, "through", "no such modality"),
        ({"through": ["one", STATES[0]]}, "through[1]", "this is state, not text"),
        ({"target": STATES, "source": "a", "method": "marginal"}, "model", "trained"),
        ({"model": "c"}, "through", "bank"),
        ({"prior": [1, 2]}, "prior", "4 targets"),
        ({"source": {"modality": "state", "embedding": [1.0, 0.0]}}, "source", "8"),
        ({"source": {"modality": "state", "embedding": [0.0] * 8}}, "source", "zero"),
        ({"model": None, "legs": [{"model": "a", "from": "state", "to": "image"}]}, "legs[0]", "state with text"),
        ({"model": None, "legs": [{"model": "a", "from": "state", "to": "text"}] * 3}, "legs[1].from", "do not meet"),
        ({"model": None, "legs": [{"model": "a", "from": "state", "to": "text"}]}, "legs[0].to", "image"),
    ],
)
async def test_what_cannot_be_composed_is_refused_with_the_reason(
    api: Any, body: dict[str, Any], param: str, words: str
) -> None:
    whole = {"model": "a", "source": STATES, "target": IMAGES} | body
    response = await api.post("/v1/compose", json=whole)
    error = response.json()["error"]
    assert response.status_code == 422, response.text
    assert error["param"].startswith(param)
    assert words in error["message"]


async def test_an_embedding_set_is_an_operand_for_the_model_that_made_it(api: Any, served: Any, tmp_path: Path) -> None:
    z = (await embed(api, IMAGES)).astype(np.float32)
    folder = tmp_path / "set"
    folder.mkdir()
    np.save(folder / "vectors.npy", z)
    key = f"embeddings/emb_{tmp_path.name[-12:].replace('_', '')}/1"
    api.service.store.publish(folder, key, kind="embeddings", id="emb_a", body={})
    info = {"model": "a", "model_digest": served[2]["model_a"].digest, "modality": "image"}
    info |= {"num_vectors": 4, "dimensions": 8, "num_bytes": 128}
    with api.service.database.engine.begin() as conn:
        row = {"id": "emb_a", "tenant_id": "default", "artifact": key, "info": info, "job_id": "job_a"}
        conn.execute(sa.insert(embedding_set).values(**row))
    rows = await compose(api, model="a", source=STATES, target={"embeddings": "emb_a"}, top_k=4)
    again = await compose(api, model="a", source=STATES, target=IMAGES, top_k=4)
    assert [m["index"] for m in rows[0]["matches"]] == [m["index"] for m in again[0]["matches"]]
    whole = {"source": STATES, "target": {"embeddings": "emb_a"}}
    assert (await api.post("/v1/compose", json={"model": "b"} | whole)).status_code == 422
    whole = {"source": STATES, "target": {"embeddings": "emb_none"}}
    assert (await api.post("/v1/compose", json={"model": "a"} | whole)).status_code == 404
    whole = {"model": "a", "source": STATES, "target": IMAGES, "through": {"embeddings": "emb_a"}}
    refused = (await api.post("/v1/compose", json=whole)).json()["error"]
    assert (refused["param"], refused["message"]) == ("through.embeddings", "these vectors are of image, not text")
    assert (await api.get("/v1/embedding-sets/emb_a")).json()["num_vectors"] == 4
    files = (await api.get("/v1/embedding-sets/emb_a/files")).json()["data"]
    assert [each["id"] for each in files] == ["vectors.npy"]
    assert (await api.client.delete("/v1/embedding-sets/emb_a")).status_code == 200
    assert (await api.get("/v1/embedding-sets")).json()["data"] == []


async def test_models_are_described_renamed_and_deleted(api: Any) -> None:
    shown = (await api.get("/v1/models/a")).json()
    assert (shown["id"], shown["aliases"], shown["state"]) == ("model_a", ["a"], "ready")
    assert shown["pairs"] == [["code", "text"], ["image", "text"], ["state", "text"]]
    assert shown["limits"]["text"] == 32
    assert shown["tokenisers"]["state"] == {"kind": "continuous", "dim": 3, "max_length": 8}
    page = (await api.get("/v1/models?limit=1")).json()
    assert page["has_more"]
    rest = (await api.get(f"/v1/models?after={page['data'][0]['id']}")).json()
    assert len(rest["data"]) == 2
    moved = await api.client.patch("/v1/models/model_b", json={"aliases": ["a", "b2"]})
    assert moved.json()["aliases"] == ["a", "b2"]
    assert (await api.get("/v1/models/a")).json()["id"] == "model_b"
    assert (await api.get("/v1/models/model_a")).json()["aliases"] == []
    for bad in ("x y", "model_" + "0" * 26, "", "a/b", "a@latest"):
        assert (await api.client.patch("/v1/models/model_b", json={"aliases": [bad]})).status_code == 422
    files = {each["id"] for each in (await api.get("/v1/models/model_a/files")).json()["data"]}
    assert {"recipe.json", "model.safetensors", "bank.safetensors", "tokenizers/text.json"} <= files
    recipe = await api.get("/v1/models/model_a/files/recipe.json")
    assert recipe.json()["dimensions"] == 8
    assert (await api.get("/v1/models/model_a/files/tokenizers/text.json")).status_code == 200
    gone = await api.client.delete("/v1/models/a")
    assert gone.json() == {"id": "model_b", "object": "model", "deleted": True}
    assert (await api.get("/v1/models/a")).status_code == 404
    assert (await api.post("/v1/embeddings", json={"model": "a", "input": "x"})).status_code == 404


async def test_a_checkpoint_is_a_model_by_its_step(api: Any, served: Any) -> None:
    ref = served[2]["model_a"]
    with api.service.database.engine.begin() as conn:
        row = {"public_id": "job_t", "tenant_id": "default", "lane": "train", "kind": "train", "fair_seq": 0}
        conn.execute(sa.insert(job).values(**row, deadline_s=1, args={}))
        number = conn.execute(sa.select(job.c.id)).scalar_one()
        kept = {"job_id": number, "tenant_id": "default", "epoch": 1, "artifact": ref.artifact, "digest": ref.digest}
        conn.execute(sa.insert(checkpoint).values(**kept, step=40, metrics={}))
    for name in ("job_t@latest", "job_t@40"):
        assert np.allclose(await embed(api, ["x"], model=name), await embed(api, ["x"]))
        shown = (await api.get(f"/v1/models/{name}")).json()
        assert (shown["id"], shown["state"], shown["job_id"]) == ("job_t@40", "checkpoint", "job_t")
    assert (await api.get("/v1/models/job_t@41")).status_code == 404
    assert (await api.client.delete("/v1/models/job_t@40")).status_code == 422


async def test_two_equal_models_are_read_each_from_its_own_files(api: Any, served: Any, publish_model: Any) -> None:
    twin = publish_model(api.service.store, "models/model_t/1", seed=1)
    assert twin.digest == served[2]["model_a"].digest
    api.add_model("model_t", twin)
    for name, ref in (("a", served[2]["model_a"]), ("model_t", twin)):
        assert (await api.service.catalogue.find("default", name)).ref == ref


async def test_inference_goes_on_while_the_database_is_away(api: Any, tmp_path: Path) -> None:
    before = await embed(api, ["x"])
    api.service.database.engine.dispose()
    (tmp_path / "isthmus.db").rename(tmp_path / "away.db")
    (tmp_path / "isthmus.db").mkdir()
    for entry in api.service.catalogue._names.values():
        entry.at = -1e9
    api.service.keys._has_key_at = -1e9
    assert np.allclose(await embed(api, ["x"]), before)
    assert (await api.get("/v1/jobs")).status_code == 503


async def test_without_a_worker_inference_is_503_and_tokenising_goes_on(api: Any) -> None:
    with api.service.database.engine.begin() as conn:
        conn.execute(sa.delete(worker))
    await api.service.gateway.stop()
    api.service.gateway = type(api.service.gateway)(api.service.settings, api.service.database.engine)
    await api.service.gateway.start()
    response = await api.post("/v1/embeddings", json={"model": "a", "input": "x"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert (await api.post("/v1/tokenize", json={"model": "a", "input": "x"})).status_code == 200
