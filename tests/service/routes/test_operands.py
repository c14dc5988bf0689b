"""Embedding sets and sums as operands, against a real inference process; all is held against computing by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import sqlalchemy as sa

from service.contract.artifacts import open_store
from service.contract.tables import embedding_set
from service.contract.vectors import Strings, write_index

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from service.contract.wire import ModelRef

pytestmark = pytest.mark.anyio

TEXT = {"text": "a caption"}
STATE = {"modality": "state", "tokens": [[0.5, 1.0, 2.0], [0.0, 0.0, 1.0]]}
CODE = {"modality": "code", "tokens": [3, 4, 5]}
STATES = [{"modality": "state", "tokens": [[a, 1.0, -a]]} for a in (0.1, 0.9)]
CODES = [{"modality": "code", "tokens": [a, a + 1]} for a in range(7)]
TEXTS = [{"text": word} for word in ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, publish_model: Any, run_inference: Any
) -> Iterator[tuple[Path, Any, dict[str, ModelRef]]]:
    folder = tmp_path_factory.mktemp("operands")
    store = open_store(str(folder / "store"))
    models = {
        "model_a": publish_model(store, "models/model_a/1", seed=1),
        "model_b": publish_model(store, "models/model_b/1", seed=2),
        "model_d": publish_model(store, "models/model_d/1", seed=3, loss={"kind": "info_nce", "critic": "dot"}),
    }
    with run_inference(folder / "store", f"unix:{folder / 's'}") as inference:
        yield folder / "store", inference, models


@pytest.fixture
async def api(start_served: Any, served: Any) -> AsyncIterator[Any]:
    folder, inference, models = served
    async with start_served(folder, inference.endpoint, models, max_items=100) as running:
        yield running


@pytest.fixture
def add_set(api: Any, served: Any, tmp_path: Path) -> Callable[..., str]:
    """Publish an embedding set as the end of its job does: `add_set("emb_a", z, "image", model="model_a")`."""

    def add(
        set_id: str, z: np.ndarray, modality: str, *, model: str = "model_a", tenant: str = "default", data: str = "d"
    ) -> str:
        folder = tmp_path / f"make-{set_id}"
        folder.mkdir()
        np.save(folder / "vectors.npy", z.astype(np.float32))
        write_index(folder, Strings.of(f"{set_id}/{row}" for row in range(len(z))))
        unique = tmp_path.name.replace("_", "-")
        key = f"embeddings/{set_id}-{unique}/1"
        body = {"dataset_digest": data, "split": "all", "num_vectors": len(z)}
        api.service.store.publish(folder, key, kind="embeddings", id=set_id, body=body)
        info = {"model": model, "model_digest": served[2][model].digest, "modality": modality}
        info |= {"num_vectors": len(z), "dimensions": z.shape[1], "num_bytes": z.nbytes}
        with api.service.database.engine.begin() as conn:
            row = {"id": set_id, "tenant_id": tenant, "artifact": key, "info": info, "job_id": "job_a"}
            conn.execute(sa.insert(embedding_set).values(**row))
        return set_id

    return add


async def embed(api: Any, items: Any, *, model: str = "a", **more: Any) -> np.ndarray:
    response = await api.post("/v1/embeddings", json={"model": model, "input": items} | more)
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]])


async def compose(api: Any, **body: Any) -> Any:
    response = await api.post("/v1/compose", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def figures(answer: Any) -> np.ndarray:
    names = ("index", "score", "log_ratio", "standard_error", "posterior")
    return np.array([[[m[name] for name in names] for m in row["matches"]] for row in answer["data"]], np.float64)


def total(*parts: tuple[Any, float]) -> dict[str, Any]:
    return {"sum": [{"item": item, "weight": weight} for item, weight in parts]}


# --- sums ---


async def test_a_sum_is_the_weighted_sum_of_unit_vectors_of_unit_length_again(api: Any) -> None:
    parts = [(TEXT, 0.7), (STATE, -1.5), (CODE, 2.0)]
    z = await embed(api, [item for item, _ in parts])
    summed = total(*parts) | {"modality": "state"}
    response = await api.post("/v1/embeddings", json={"model": "a", "input": ["before", summed, STATE]})
    body = response.json()
    assert response.status_code == 200, body
    assert [entry["modality"] for entry in body["data"]] == ["text", "state", "state"]
    by_hand = np.array([weight for _, weight in parts]) @ z
    found = np.array([entry["embedding"] for entry in body["data"]])
    np.testing.assert_allclose(found[1], by_hand / np.linalg.norm(by_hand), atol=1e-6)
    np.testing.assert_allclose(found[2], z[1], atol=1e-6)
    alone = [
        (await api.post("/v1/embeddings", json={"model": "a", "input": each})).json() for each in ["before", STATE]
    ]
    each = [(await api.post("/v1/embeddings", json={"model": "a", "input": item})).json() for item, _ in parts]
    used = sum(one["usage"]["prompt_tokens"] for one in [*alone, *each])
    assert body["usage"]["prompt_tokens"] == used


async def test_the_sum_of_other_critics_keeps_its_length(api: Any) -> None:
    z = await embed(api, [TEXT, STATE], model="d")
    found = await embed(api, total((TEXT, 3.0), (STATE, -0.5)) | {"modality": "text"}, model="d")
    np.testing.assert_allclose(found[0], 3 * z[0] - 0.5 * z[1], rtol=1e-5)


async def test_a_sum_counts_as_the_modality_that_is_said_where_its_own_is_not(api: Any) -> None:
    mixed = total((TEXT, 1.0), (STATE, 1.0))
    vector = (await embed(api, mixed, modality="state"))[0].tolist()
    same = (await embed(api, mixed | {"modality": "state"}))[0].tolist()
    assert vector == same
    ready = {"embedding": vector, "modality": "state"}
    of_one = total((STATES[0], 1.0), (STATES[1], 1.0))  # all parts are states: nothing needs to be said
    one = {"embedding": (await embed(api, of_one))[0].tolist(), "modality": "state"}
    legs = [{"model": "a", "from": "state", "to": "text"}, {"model": "a", "from": "text", "to": "code"}]
    for wanted, given, more in (
        ([ready], [mixed], {"legs": legs}),
        ([ready], [mixed], {"model": "a", "source_modality": "state"}),
        ([one], [of_one], {"model": "a"}),
    ):
        by_hand = await compose(api, source=wanted, target=CODES, top_k=7, **more)
        found = await compose(api, source=given, target=CODES, top_k=7, **more)
        np.testing.assert_allclose(figures(found), figures(by_hand), atol=1e-4)
    target = total((CODES[0], 0.5), (TEXT, 0.5)) | {"modality": "code"}
    found = await compose(api, model="a", source=STATES, target=[*CODES, target], top_k=8)
    vector = (await embed(api, target))[0].tolist()
    by_hand = await compose(
        api, model="a", source=STATES, target=[*CODES, {"embedding": vector, "modality": "code"}], top_k=8
    )
    np.testing.assert_allclose(figures(found), figures(by_hand), atol=1e-4)


async def test_a_sum_is_classified_like_its_vector(api: Any) -> None:
    summed = total((TEXT, 0.3), (STATE, 0.7)) | {"modality": "state"}
    vector = {"embedding": (await embed(api, summed))[0].tolist(), "modality": "state"}
    labels = {"labels": {"up": ["one", "two"], "down": ["three"]}, "model": "a"}
    answers = [await api.post("/v1/classify", json=labels | {"input": [item]}) for item in (summed, vector)]
    first, second = (answer.json()["data"][0]["predictions"] for answer in answers)
    assert [each["label"] for each in first] == [each["label"] for each in second]
    np.testing.assert_allclose([e["score"] for e in first], [e["score"] for e in second], atol=1e-5)


@pytest.mark.parametrize(
    ("item", "param", "words"),
    [
        (total((TEXT, 1.0), (STATE, 1.0)), "input[1].sum", "say with modality"),
        (total((total((TEXT, 1.0)), 1.0)), "input[1].sum[0].item", "no sum itself"),
        (total((TEXT, 0.0), (TEXT, 0)), "input[1]", "all weights are zero"),
        (total((TEXT, 1.0), (TEXT, -1.0)), "input[1].sum", "cancel"),
        (total((TEXT, 1.0)) | {"modality": "smell"}, "input[1].modality", "no such modality"),
        (total((TEXT, 1.0), ({"text": "x" * 10_000}, 1.0)), "input[1].sum[1].item", "tokens"),
        (total((TEXT, 1.0), ({"embedding": [1.0], "modality": "text"}, 1.0)), "input[1].sum[1].item.embedding", "8"),
        ({"sum": []}, "input[1].sum", "at least 1"),
        (total(*[(TEXT, 1.0)] * 65), "input[1].sum", "at most 64"),
        ({"sum": [{"item": TEXT, "weight": "heavy"}]}, "input[1].sum[0].weight", "number"),
        ({"sum": [{"item": TEXT, "wait": 1}]}, "input[1].sum[0].wait", ""),
    ],
)  # fmt: skip
async def test_a_sum_that_is_none_is_refused_with_its_place(api: Any, item: Any, param: str, words: str) -> None:
    response = await api.post("/v1/embeddings", json={"model": "a", "input": ["fine", item]})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param), error
    assert words in error["message"]


async def test_parts_count_towards_the_limits(api: Any) -> None:
    many = [total(*[(TEXT, 1.0)] * 51)] * 2
    refused = await api.post("/v1/embeddings", json={"model": "a", "input": many})
    assert (refused.status_code, "at most 100" in refused.text) == (422, True)
    refused = await api.post("/v1/tokenize", json={"model": "a", "input": [total((TEXT, 1.0))]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "input[0].sum")


# --- embedding sets ---


async def test_sets_answer_as_their_items_do_and_name_the_keys(api: Any, add_set: Any) -> None:
    states, codes, texts = await embed(api, STATES), await embed(api, CODES), await embed(api, TEXTS)
    sets = {
        "source": {"embeddings": add_set("emb_states", states, "state")},
        "target": {"embeddings": add_set("emb_codes", codes, "code")},
        "through": {"embeddings": add_set("emb_texts", texts, "text")},
    }
    items = {"source": STATES, "target": CODES, "through": TEXTS}
    by_hand = await compose(api, model="a", **items, top_k=7)
    assert {m["key"] for row in by_hand["data"] for m in row["matches"]} == {None}
    for names in (["source"], ["target"], ["through"], ["source", "target", "through"]):
        found = await compose(api, model="a", **items | {name: sets[name] for name in names}, top_k=7)
        np.testing.assert_allclose(figures(found), figures(by_hand), atol=1e-4)
        for row in found["data"]:
            for match in row["matches"]:
                assert match["key"] == (f"emb_codes/{match['index']}" if "target" in names else None)
    weighed = await compose(
        api, model="a", source=sets["source"], target=sets["target"], prior=[1, 0, 0, 2, 0, 0, 0], top_k=2
    )
    assert {match["key"] for row in weighed["data"] for match in row["matches"]} == {"emb_codes/0", "emb_codes/3"}


async def test_legs_of_two_models_take_the_same_samples_under_each(api: Any, add_set: Any) -> None:
    under_a, under_b = await embed(api, TEXTS), await embed(api, TEXTS, model="b")
    a, b = add_set("emb_a", under_a, "text"), add_set("emb_b", under_b, "text", model="model_b")
    legs = [{"model": "a", "from": "state", "to": "text"}, {"model": "b", "from": "text", "to": "code"}]
    question = {"legs": legs, "source": STATES, "target": CODES, "top_k": 7}
    by_hand = await compose(api, **question, through=TEXTS)
    found = await compose(api, **question, through=[{"embeddings": a}, {"embeddings": b}])
    np.testing.assert_allclose(figures(found), figures(by_hand), atol=1e-4)
    add_set("emb_fewer", under_b[:5], "text", model="model_b")
    add_set("emb_other", under_b, "text", model="model_b", data="another")
    for through, param, words in (
        ({"embeddings": "emb_a"}, "through", "under each"),
        ([{"embeddings": a}, {"embeddings": "emb_fewer"}], "through", "the same samples"),
        ([{"embeddings": a}, {"embeddings": "emb_other"}], "through", "the same samples"),
        ([{"embeddings": b}, {"embeddings": a}], "through[0].embeddings", "another model"),
    ):
        refused = await api.post("/v1/compose", json=question | {"through": through})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (422, param), error
        assert words in error["message"]
    one = question | {"legs": [legs[0], legs[1] | {"model": "a"}], "through": [{"embeddings": a}, {"embeddings": a}]}
    assert "share one set" in (await api.post("/v1/compose", json=one)).json()["error"]["message"]


@pytest.mark.parametrize(
    ("place", "given", "status", "param"),
    [
        ("source", "emb_other_model", 422, "source.embeddings"),
        ("target", "emb_other_model", 422, "target.embeddings"),
        ("source", "emb_text", 422, None),
        ("through", "emb_code", 422, "through.embeddings"),
        ("target", "emb_foreign", 404, "target.embeddings"),
        ("target", "emb_none", 404, "target.embeddings"),
        ("source", "emb_narrow", 422, "source.embeddings"),
    ],
)  # fmt: skip
async def test_a_set_that_does_not_fit_is_refused(
    api: Any, add_set: Any, place: str, given: str, status: int, param: str | None
) -> None:
    z = np.eye(8)
    add_set("emb_other_model", z, "code", model="model_b")
    add_set("emb_text", z, "text")
    add_set("emb_code", z, "code")
    add_set("emb_foreign", z, "code", tenant="somebody")
    add_set("emb_narrow", z[:, :4], "code")
    question = {"model": "a", "source": STATES, "target": CODES} | {place: {"embeddings": given}}
    if given == "emb_text":
        question["legs"] = [{"model": "a", "from": "state", "to": "text"}, {"model": "a", "from": "text", "to": "code"}]
        del question["model"]
    refused = await api.post("/v1/compose", json=question)
    assert refused.status_code == status, refused.text
    assert param is None or refused.json()["error"]["param"] == param


async def test_a_vector_without_direction_in_a_set_is_named(api: Any, add_set: Any) -> None:
    z = np.eye(8)
    z[5] = 0
    question = {"model": "a", "source": STATES, "target": {"embeddings": add_set("emb_zero", z, "code")}}
    for _ in range(2):
        refused = await api.post("/v1/compose", json=question)
        assert (refused.status_code, refused.json()["error"]["message"]) == (422, "target[5] has no direction")


async def test_deleting_a_set_is_the_end_of_it_whenever_that_happens(api: Any, add_set: Any) -> None:
    rng = np.random.default_rng(0)
    add_set("emb_big", rng.normal(size=(20_000, 8)), "code")
    question = {"model": "a", "source": STATES, "target": {"embeddings": "emb_big"}, "top_k": 1}
    before = await compose(api, **question)
    asked = [api.post("/v1/compose", json=question) for _ in range(4)]
    gone = api.client.delete("/v1/embedding-sets/emb_big")
    *answers, deleted = await asyncio.gather(*asked, gone)
    assert deleted.status_code == 200
    for answer in answers:  # who found it first has it whole
        assert answer.status_code in {200, 404}
        if answer.status_code == 200:
            np.testing.assert_allclose(figures(answer.json()), figures(before), rtol=1e-5)
    assert (await api.post("/v1/compose", json=question)).status_code == 404
    assert (await api.client.delete("/v1/embedding-sets/emb_big")).status_code == 404


def resident_kib(pid: int) -> int:
    """Read how much memory is a process's own: pages of mapped files are the kernel's to take back."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("num", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
async def test_a_large_set_is_streamed_from_its_file(
    api: Any, served: Any, add_set: Any, publish_model: Any, num: int
) -> None:
    folder, inference, models = served
    if "model_w" not in models:
        models["model_w"] = publish_model(open_store(str(folder)), "models/model_w/1", seed=5, dimensions=32)
    api.add_model("model_w", models["model_w"], name="w")
    rng = np.random.default_rng(1)
    z = np.empty((num, 32), np.float32)
    for start in range(0, num, 50_000):
        z[start : start + 50_000] = rng.normal(size=(50_000, 32))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    add_set("emb_large", z, "code", model="model_w")
    question = {"model": "w", "source": STATES, "method": "direct", "top_k": 10}
    first = {"embeddings": add_set("emb_first", z[:5000], "code", model="model_w")}
    await compose(api, **question, target=first)  # the model is loaded, and the allocator warm
    before = resident_kib(inference.process.pid)
    found = await compose(api, **question, target={"embeddings": "emb_large"})
    grown = resident_kib(inference.process.pid) - before
    scores = (await embed(api, STATES, model="w")) @ z.T
    for row, of in zip(found["data"], scores, strict=True):
        best = np.argsort(-of, kind="stable")[:10]
        assert [match["index"] for match in row["matches"]] == best.tolist()
        assert [match["key"] for match in row["matches"]] == [f"emb_large/{at}" for at in best]
        np.testing.assert_allclose([match["score"] for match in row["matches"]], of[best], atol=1e-5)
    assert grown < 48 << 10, f"{grown} KiB"
