"""The inference process over a real socket, with real (small, untrained) models."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from service.contract.artifacts import Store
from service.contract.wire import Arrays, ModelRef, pack, unpack
from worker.learning.model import Loaded, load_model
from worker.learning.ragged import Ragged

ROOT = Path(__file__).resolve().parents[3]
MODALITIES = ("image", "text", "state", "code")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def loaded(folder: Path, model: ModelRef) -> Loaded:
    return load_model(folder / "store" / model.artifact, "cpu")


@pytest.fixture(scope="module")
def inference(folder: Path, run_inference: Any) -> Iterator[Any]:
    # Small batches, so that a few hundred tokens make several of them.
    environment = {"ISTHMUS_SERVE_BATCH_TOKENS": "1024", "ISTHMUS_MODEL_CACHE_BYTES": "300000"}
    with run_inference(folder / "store", f"unix:{folder / 'socket'}", environment=environment) as running:
        yield running


def embed_body(model: ModelRef, modality: str, items: list[list[np.ndarray]]) -> bytes:
    sequences = [sequence for item in items for sequence in item]
    arrays: Arrays = {
        "values": np.concatenate(sequences),
        "lengths": np.array([len(sequence) for sequence in sequences], np.int32),
        "owners": np.repeat(np.arange(len(items), dtype=np.int32), [len(item) for item in items]),
    }
    return pack({"op": "embed", "model": model.model_dump(), "modality": modality}, arrays)


def embed(inference: Any, model: ModelRef, modality: str, items: list[list[np.ndarray]], **headers: str) -> Any:
    return inference.client.post("/call", content=embed_body(model, modality, items), headers=headers)


def vectors_of(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return unpack(response.content)[1]["vectors"]


def forward(loaded: Loaded, modality: str, items: list[list[np.ndarray]]) -> np.ndarray:
    with torch.inference_mode():
        return loaded.model.encode(modality, Ragged.from_sequences(items)).numpy()


@pytest.mark.parametrize("modality", MODALITIES)
def test_vectors_are_those_of_the_model_item_by_item(
    inference: Any, model: ModelRef, loaded: Loaded, draw_tokens: Any, modality: str
) -> None:
    rng = np.random.default_rng(0)
    # Windows: every third item is several sequences, whose unit vectors are averaged.
    items = [[draw_tokens(rng, modality) for _ in range(3 if at % 3 == 0 else 1)] for at in range(40)]
    response = embed(inference, model, modality, items)
    expected = np.concatenate([forward(loaded, modality, [item]) for item in items])
    np.testing.assert_allclose(vectors_of(response), expected, atol=1e-5)
    assert float(response.headers["x-queue-ms"]) >= 0
    assert float(response.headers["x-inference-ms"]) > 0


def test_a_call_larger_than_a_batch_is_cut_into_several(
    inference: Any, model: ModelRef, loaded: Loaded, draw_tokens: Any
) -> None:
    rng = np.random.default_rng(1)
    items = [[draw_tokens(rng, "code")] for _ in range(200)]
    before = inference.metric("batches_total")
    np.testing.assert_allclose(
        vectors_of(embed(inference, model, "code", items)), forward(loaded, "code", items), atol=1e-5
    )
    assert inference.metric("batches_total") - before > 3


def test_calls_that_come_together_are_answered_each_with_its_own(
    inference: Any, model: ModelRef, loaded: Loaded, draw_tokens: Any
) -> None:
    rng = np.random.default_rng(2)
    asked = [(each, [[draw_tokens(rng, each)] for _ in range(1 + at % 3)]) for at, each in enumerate(MODALITIES * 16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda ask: vectors_of(embed(inference, model, *ask)), asked))
    for (modality, items), answer in zip(asked, answers, strict=True):
        np.testing.assert_allclose(answer, forward(loaded, modality, items), atol=1e-5)


def test_two_models_are_served_side_by_side(
    inference: Any, models: Store, model: ModelRef, folder: Path, publish_model: Any, draw_tokens: Any
) -> None:
    other = publish_model(models, "models/model_b/1", seed=2)
    items = [[draw_tokens(np.random.default_rng(3), "text")]]
    ours = vectors_of(embed(inference, model, "text", items))
    theirs = vectors_of(embed(inference, other, "text", items))
    np.testing.assert_allclose(
        theirs, forward(load_model(folder / "store" / other.artifact, "cpu"), "text", items), atol=1e-5
    )
    assert np.abs(ours - theirs).max() > 1e-3


def test_the_least_recently_used_model_leaves_when_memory_is_short(
    inference: Any, models: Store, model: ModelRef, publish_model: Any, draw_tokens: Any
) -> None:
    items = [[draw_tokens(np.random.default_rng(4), "text")]]
    for number in range(6):
        ref = publish_model(models, f"models/model_lru{number}/1", seed=number)
        vectors_of(embed(inference, ref, "text", items))
    assert inference.metric("model_bytes") <= 300_000
    assert 1 <= inference.metric("models_loaded") < 6
    vectors_of(embed(inference, model, "text", items))  # whichever left comes back when asked for


def test_a_model_can_be_unloaded_and_comes_back(inference: Any, model: ModelRef, draw_tokens: Any) -> None:
    items = [[draw_tokens(np.random.default_rng(5), "text")]]
    vectors_of(embed(inference, model, "text", items))
    before = inference.metric("models_loaded")
    inference.control({"unload": model.artifact})
    inference.control({"threads": 1})
    inference.control({"memory": 0.2})
    inference.control({"who": "knows"})
    deadline = time.monotonic() + 10
    while inference.metric("models_loaded") == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert inference.metric("models_loaded") == before - 1
    vectors_of(embed(inference, model, "text", items))


def test_an_unknown_model_is_not_found(inference: Any) -> None:
    ref = ModelRef(artifact="models/model_none/1", digest="0" * 64)
    response = embed(inference, ref, "text", [[np.array([1, 2], np.int32)]])
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "NotFound"


def test_a_model_that_is_not_the_one_meant_is_refused(inference: Any, model: ModelRef) -> None:
    ref = ModelRef(artifact=model.artifact, digest="0" * 64)
    response = embed(inference, ref, "text", [[np.array([1, 2], np.int32)]])
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "digest_mismatch"


def test_a_damaged_model_is_refused(inference: Any, models: Store, folder: Path, publish_model: Any) -> None:
    ref = publish_model(models, "models/model_bad/1", seed=9)
    weights = folder / "store" / ref.artifact / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    response = embed(inference, ref, "text", [[np.array([1, 2], np.int32)]])
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "artifact_damaged"


HEADER = b'{"__metadata__":{"call":"{}"}}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"\xff" * 100,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b'{"__metadata__":{"call":"{}"}}',
        len(b"[" * 5000).to_bytes(8, "little") + b"[" * 5000,
        len(HEADER).to_bytes(8, "little") + HEADER[:-1],
        pack({"op": "embed"}, {})[:-1],
    ],
)
def test_hostile_bytes_are_malformed(inference: Any, body: bytes) -> None:
    response = inference.client.post("/call", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "Malformed"


@pytest.mark.parametrize(
    ("document", "arrays", "status"),
    [
        ({}, {}, 422),
        ({"op": "launch"}, {}, 422),
        ({"op": "embed"}, {}, 422),
        ("list", {}, 422),
    ],
)
def test_a_document_that_is_no_call_is_invalid(inference: Any, document: Any, arrays: Arrays, status: int) -> None:
    assert inference.client.post("/call", content=pack(document, arrays)).status_code == status


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("modality", "arrays", "status"),
    [
        ("smell", {"values": i32(1), "lengths": i32(1), "owners": i32(0)}, 422),
        ("code", {}, 400),
        ("code", {"values": i32(1), "lengths": i32(1)}, 400),
        ("code", {"values": i32(1), "lengths": i32(2), "owners": i32(0)}, 400),
        ("code", {"values": i32(1, 1), "lengths": i32(3, -1), "owners": i32(0, 1)}, 400),
        ("code", {"values": i32(1, 1), "lengths": i32(2, 0), "owners": i32(0, 1)}, 400),
        ("code", {"values": i32(1, 1), "lengths": i32(1, 1), "owners": i32(0, 2)}, 400),
        ("code", {"values": i32(1, 1), "lengths": i32(1, 1), "owners": i32(1, 0)}, 400),
        ("code", {"values": i32(), "lengths": i32(), "owners": i32()}, 400),
        ("code", {"values": np.ones(1, np.float32), "lengths": i32(1), "owners": i32(0)}, 400),
        ("code", {"values": i32(50), "lengths": i32(1), "owners": i32(0)}, 422),
        ("code", {"values": i32(-1), "lengths": i32(1), "owners": i32(0)}, 422),
        ("code", {"values": i32(*[0] * 65), "lengths": i32(65), "owners": i32(0)}, 422),
        ("state", {"values": np.ones((1, 4), np.float32), "lengths": i32(1), "owners": i32(0)}, 422),
        ("state", {"values": np.full((1, 3), np.nan, np.float32), "lengths": i32(1), "owners": i32(0)}, 422),
        ("image", {"values": np.ones((1, 16), np.float32), "lengths": i32(1), "owners": i32(0)}, 400),
    ],
)
def test_tensors_that_the_model_cannot_take_are_refused(
    inference: Any, model: ModelRef, modality: str, arrays: Arrays, status: int
) -> None:
    document = {"op": "embed", "model": model.model_dump(), "modality": modality}
    assert inference.client.post("/call", content=pack(document, arrays)).status_code == status


def test_a_bad_item_fails_alone_and_is_named(inference: Any, model: ModelRef, loaded: Loaded, draw_tokens: Any) -> None:
    rng = np.random.default_rng(6)
    good = [[draw_tokens(rng, "state")] for _ in range(30)]
    # Finite tokens whose vector is not: only the arithmetic itself can find out.
    bad = [*good[:4], [np.full((2, 3), 3e38, np.float32)], *good[4:8]]
    statuses: list[int] = []

    def ask(at: int) -> None:
        if at % 4 == 0:
            response = embed(inference, model, "state", bad)
            statuses.append(response.status_code)
            assert response.json()["error"]["item"] == 4
            assert response.json()["error"]["code"] == "item_failed"
        else:
            np.testing.assert_allclose(
                vectors_of(embed(inference, model, "state", good)), forward(loaded, "state", good), atol=1e-5
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))
    assert statuses == [422] * 6
    assert inference.client.get("/readyz").status_code == 200


def test_a_deadline_that_has_passed_is_answered_without_work(inference: Any, model: ModelRef, draw_tokens: Any) -> None:
    items = [[draw_tokens(np.random.default_rng(7), "text")]]
    vectors_of(embed(inference, model, "text", items))
    before = inference.metric("items_total")
    response = embed(inference, model, "text", items, **{"x-deadline-ms": "0"})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline"
    assert int(response.headers["retry-after"]) >= 1
    assert inference.metric("items_total") == before
    assert embed(inference, model, "text", items, **{"x-deadline-ms": "nan"}).status_code == 400


def test_items_of_a_client_that_hangs_up_are_dropped(
    inference: Any, model: ModelRef, folder: Path, draw_tokens: Any
) -> None:
    rng = np.random.default_rng(8)
    body = embed_body(model, "code", [[draw_tokens(rng, "code")] for _ in range(20_000)])
    before = inference.metric("items_dropped_total")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(folder / "socket"))
        head = f"POST /call HTTP/1.1\r\nhost: worker\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 20
        while not inference.metric("items_waiting") and time.monotonic() < deadline:
            time.sleep(0.005)
    deadline = time.monotonic() + 20
    while inference.metric("items_dropped_total") == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert inference.metric("items_dropped_total") > before
    assert inference.metric("items_waiting") == 0


def test_one_text_does_not_wait_for_a_long_call(inference: Any, model: ModelRef, draw_tokens: Any) -> None:
    rng = np.random.default_rng(9)
    long_call = [[draw_tokens(rng, "code")] for _ in range(8000)]
    done: list[float] = []

    def ask() -> None:
        vectors_of(embed(inference, model, "code", long_call))
        done.append(time.monotonic())

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 20
    while not inference.metric("items_waiting") and time.monotonic() < deadline:
        time.sleep(0.005)
    vectors_of(embed(inference, model, "code", long_call[:1]))
    answered = time.monotonic()
    thread.join()
    assert answered < done[0]


def test_an_endpoint_open_to_others_without_a_token_is_refused_at_the_start(folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-P", "-m", "worker.serving", "--endpoint", "0.0.0.0:0", "--store", str(folder / "store")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 2
    assert b"ISTHMUS_WORKER_TOKEN" in result.stderr


def test_over_tcp_every_call_needs_the_token(
    folder: Path, model: ModelRef, run_inference: Any, draw_tokens: Any
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"SOME_TOKEN": "correct horse"}
    endpoint = f"127.0.0.1:{port}"
    with run_inference(folder / "store", endpoint, "--token-env", "SOME_TOKEN", environment=environment) as running:
        body = embed_body(model, "text", [[draw_tokens(np.random.default_rng(0), "text")]])
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "correct horse"}):
            response = running.client.post("/call", content=body, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "Unauthenticated"
        response = running.client.post("/call", content=body, headers={"authorization": "Bearer correct horse"})
        assert response.status_code == 200


def test_it_ends_with_its_supervisor_and_its_socket_can_be_bound_again(
    folder: Path, model: ModelRef, run_inference: Any, draw_tokens: Any
) -> None:
    endpoint = f"unix:{folder / 'again'}"
    with run_inference(folder / "store", endpoint) as running:
        running.process.stdin.close()
        assert running.process.wait(timeout=10) == 0
        with run_inference(folder / "store", endpoint) as again:
            vectors_of(embed(again, model, "text", [[draw_tokens(np.random.default_rng(0), "text")]]))
