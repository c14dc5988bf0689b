"""The whole way, with the real processes, on both databases: upload, train, embed, classify, compose, evaluate."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import Any

import numpy as np
import openai
import psutil

DIGITS = ("zero", "one", "two", "three", "four", "five")


def test_pairs_go_in_and_answers_across_pairs_come_out(
    running: Any, pairs: Any, recipe: Any, draw: Any, read_events: Any
) -> None:
    """Image-text, audio-text and imu-text are learned; audio-image is asked."""
    holdout = '{"fraction": 0.2, "seed": 1}'
    datasets = {
        "image": running.upload("drawings", pairs("png", 240), holdout=holdout),
        "audio": running.upload("tones", pairs("wav", 240, seed=1), holdout=holdout),
        "imu": running.upload("movements", pairs("imu.npy", 240, seed=2), holdout=holdout),
    }
    for modality, dataset in datasets.items():
        assert dataset["status"] == "ready"
        assert dataset["num_samples"] == 240
        assert set(dataset["modalities"]) == {modality, "text"}
        assert sum(dataset["splits"].values()) == 240
        assert 20 < dataset["splits"]["holdout"] < 80
    ids = {modality: dataset["id"] for modality, dataset in datasets.items()}

    job = running.post("/v1/jobs", {"kind": "train", "name": "shapes", "recipe": recipe(ids, steps=120)})
    assert job["status"] == "queued"
    events = read_events(running.follow(job["id"]))
    assert events[-1]["data"]["status"] == "succeeded", events[-1]
    done = running.get(f"/v1/jobs/{job['id']}")
    assert done["progress"]["done"] == done["progress"]["total"] == 120
    series = running.get(f"/v1/jobs/{job['id']}/metrics")
    assert {"loss/image+text", "loss/audio+text", "loss/imu+text"} <= set(series["series"]), series

    _embed_with_the_openai_client(running)
    _embed_is_deterministic_across_forms(running, draw)
    _classify(running, draw)
    _compose(running, draw)
    _evaluate(running, ids)


def _embed_with_the_openai_client(running: Any) -> None:
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none") as client:
        texts = ["a drawing of one", "the sound of one", "the sound of two"]
        packed = client.embeddings.create(model="shapes", input=texts)  # the client asks for base64 by itself
        plain = client.embeddings.create(model="shapes", input=texts, encoding_format="float", dimensions=16)
        assert [model.id for model in client.models.list()] == [packed.model] or packed.model == "shapes"
    z = np.array([entry.embedding for entry in packed.data])
    cut = np.array([entry.embedding for entry in plain.data])
    assert z.shape == (3, 32)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(cut, z[:, :16] / np.linalg.norm(z[:, :16], axis=1, keepdims=True), atol=1e-5)
    assert packed.usage.prompt_tokens > 0


def _embed_is_deterministic_across_forms(running: Any, draw: Any) -> None:
    image = draw("image", 1)[0]
    tokens = running.post("/v1/tokenize", {"model": "shapes", "input": [image]})["data"][0]
    again = {"modality": "image", "tokens": tokens["tokens"][0]}
    body = {
        "model": "shapes",
        "input": [image, again, {"text": "a drawing of one"}, {"modality": "imu", "tokens": [[1.0, 0.0, 0.0]]}],
    }
    answer = running.post("/v1/embeddings", body)["data"]
    assert [entry["modality"] for entry in answer] == ["image", "image", "text", "imu"]
    np.testing.assert_allclose(answer[0]["embedding"], answer[1]["embedding"], atol=1e-6)


def _classify(running: Any, draw: Any) -> None:
    for modality, template in (("image", "a drawing of {}"), ("audio", "the sound of {}")):
        body = {"model": "shapes", "input": draw(modality, 30), "labels": list(DIGITS), "templates": [template]}
        answer = running.post("/v1/classify", body)["data"]
        right = [entry["prediction"] == DIGITS[index % 6] for index, entry in enumerate(answer)]
        assert np.mean(right) > 0.8, (modality, answer[:2])
        for entry in answer:
            np.testing.assert_allclose(sum(p["score"] for p in entry["predictions"]), 1, atol=1e-5)


def _compose(running: Any, draw: Any) -> None:
    body = {"model": "shapes", "source": draw("audio", 12), "target": draw("image", 30), "top_k": 30}
    for method in ("auto", "direct", "marginal"):
        answer = running.post("/v1/compose", body | {"method": method})["data"]
        hits = [
            match["index"] % 6 == entry["index"] % 6 for entry in answer for match in entry["matches"][:5]
        ]  # 5 of the 30 images show each digit
        assert np.mean(hits) > 0.7, (method, answer[0])
        for entry in answer:
            about, matches = entry["diagnostics"], entry["matches"]
            assert about["method"] == ("direct" if method == "direct" else "marginal")
            if about["method"] == "marginal":
                assert about["through"] == "text"
                assert 1 <= about["effective_sample_size"] <= about["bridge_size"]
                np.testing.assert_allclose(sum(match["posterior"] for match in matches), 1, atol=1e-4)
                assert all(match["standard_error"] >= 0 for match in matches)
            else:
                assert all(match["posterior"] is None for match in matches)
    refused = running.http.post("/v1/classify", json={
        "model": "shapes", "input": draw("audio", 1), "labels": {"one": draw("image", 1)},
    })  # fmt: skip
    assert refused.status_code == 422
    assert "audio" in refused.json()["error"]["message"]


def _evaluate(running: Any, ids: dict[str, str]) -> None:
    body = {"kind": "evaluate", "model": "shapes", "datasets": list(ids.values()), "ks": [1, 5]}
    job = running.wait(running.post("/v1/jobs", body)["id"])
    report = running.get(f"/v1/jobs/{job['id']}/files/report.json")
    assert report
    assert job["result"]["summary"], job["result"]
    embedded = running.post(
        "/v1/jobs",
        {"kind": "embed", "model": "shapes", "dataset": ids["image"], "modality": "image", "split": "holdout"},
    )
    result = running.wait(embedded["id"])["result"]
    assert result["num_vectors"] > 20
    assert result["dimensions"] == 32


def test_a_training_job_survives_the_death_of_its_worker_and_its_model_is_served(
    serve: Any, tmp_path: Any, pairs: Any, recipe: Any
) -> None:
    """kill -9 of the runner, then of the supervisor; cancel and retry; checkpoints answer while training goes on."""
    with serve(tmp_path / "data", ISTHMUS_WORKER_TTL_S="3", ISTHMUS_HEARTBEAT_S="0.5") as running:
        dataset = running.upload("drawings", pairs("png", 120))
        budget = {"steps": 100_000, "batch_size": 32, "checkpoint_s": 0.5, "log_every": 5}
        body = {"kind": "train", "recipe": recipe({"image": dataset["id"]}, budget=budget)}
        job = running.post("/v1/jobs", body)["id"]
        _until(lambda: running.get(f"/v1/jobs/{job}/checkpoints")["data"])

        answer = running.post("/v1/embeddings", {"model": f"{job}@latest", "input": "a drawing of one"})
        assert len(answer["data"][0]["embedding"]) == 32

        before = _step(running, job)
        for module in ("worker.runner", "worker"):
            for child in psutil.Process(running.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it went with the one before it
                    if module in child.cmdline() and child.cpu_times().user > 0:
                        child.send_signal(signal.SIGKILL)
            _until_beyond(running, job, before)
            before = _step(running, job)
        assert running.get(f"/v1/jobs/{job}")["attempt"] >= 2

        running.post(f"/v1/jobs/{job}/cancel", {})
        running.wait(job, status="cancelled", timeout_s=20)
        finished = running.http.post(f"/v1/jobs/{job}/cancel")
        assert finished.status_code == 400
        assert finished.json()["error"]["code"] == "job_already_finished"
        step = _step(running, job)
        running.post(f"/v1/jobs/{job}/retry", {})
        _until_beyond(running, job, step)
        events = running.get(f"/v1/jobs/{job}/events?limit=100")["data"]
        assert any(event["type"] == "resumed" for event in events)
        running.post(f"/v1/jobs/{job}/cancel", {})
        running.wait(job, status="cancelled", timeout_s=20)


def _step(running: Any, job: str) -> int:
    return (running.get(f"/v1/jobs/{job}")["progress"] or {}).get("done") or 0


def _until_beyond(running: Any, job: str, step: int) -> None:
    _until(lambda: running.get(f"/v1/jobs/{job}")["status"] == "running" and _step(running, job) > step)


def _until(condition: Any, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
