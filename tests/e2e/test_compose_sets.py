"""Embedding sets from their making to their end: made, downloaded, composed over by a job that is killed, deleted."""

from __future__ import annotations

import contextlib
import io
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq


def test_sets_are_made_fetched_composed_and_deleted(serve: Any, tmp_path: Path, pairs: Any, recipe: Any) -> None:
    with serve(tmp_path / "data", ISTHMUS_WORKER_TTL_S="3", ISTHMUS_HEARTBEAT_S="0.5") as running:
        drawings, sounds = running.upload("drawings", pairs("png", 120)), running.upload("sounds", pairs("wav", 120))
        budget = {"steps": 30, "batch_size": 32}
        trained = recipe({"image": drawings["id"], "audio": sounds["id"]}, budget=budget)
        running.wait(running.post("/v1/jobs", {"kind": "train", "recipe": trained, "name": "shapes"})["id"])
        sets: dict[str, str] = {}
        for modality, dataset in (("image", drawings), ("audio", sounds)):
            args = {"kind": "embed", "model": "shapes", "dataset": dataset["id"], "modality": modality}
            running.wait(running.post("/v1/jobs", args)["id"])
            sets[modality] = running.get("/v1/embedding-sets")["data"][0]["id"]

        # Both files hold the same, row for row; ranges and listings are those of every artifact.
        path = f"/v1/embedding-sets/{sets['image']}/files"
        files = {each["id"]: each["num_bytes"] for each in running.get(path)["data"]}
        assert set(files) == {"embeddings.parquet", "index.safetensors", "vectors.npy"}
        whole = running.http.get(f"{path}/vectors.npy").content
        z = np.load(io.BytesIO(whole))
        table = pq.read_table(io.BytesIO(running.http.get(f"{path}/embeddings.parquet").content)).to_pydict()
        np.testing.assert_array_equal(np.array(table["vector"], np.float32), z)
        part = running.http.get(f"{path}/vectors.npy", headers={"range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, whole[100:200])

        question = {"source": {"embeddings": sets["audio"]}, "target": {"embeddings": sets["image"]}, "top_k": 3}
        online = running.post("/v1/compose", question | {"model": "shapes", "method": "marginal"})["data"]

        # Killed as it works, the job is done again from the start, and answers what the online call does.
        body = {"kind": "compose", "model": "shapes", "method": "marginal", **question}
        job = running.post("/v1/jobs", body)["id"]
        _kill_runner(running, job)
        done = running.wait(job)
        assert done["attempt"] == 2
        assert (done["result"]["num_sources"], done["result"]["num_targets"]) == (120, 120)
        matches = running.http.get(f"/v1/jobs/{job}/files/matches.parquet").content
        found = pq.read_table(io.BytesIO(matches)).to_pydict()
        keys = [match["key"] for row in online for match in row["matches"]]
        assert found["target"] == keys
        assert set(keys) <= set(table["key"])
        np.testing.assert_allclose(
            found["log_ratio"], [match["log_ratio"] for row in online for match in row["matches"]], atol=1e-4
        )
        assert running.get(f"/v1/jobs/{job}/files/summary.json")["method"] == "marginal"

        held = running.post("/v1/jobs", body | {"run_at": "2100-01-01T00:00:00Z"})["id"]
        assert running.http.delete(f"/v1/embedding-sets/{sets['image']}").status_code == 409
        running.post(f"/v1/jobs/{held}/cancel", {})
        assert running.http.delete(f"/v1/embedding-sets/{sets['image']}").status_code == 200
        assert running.http.post("/v1/compose", json=question | {"model": "shapes"}).status_code == 404


def _kill_runner(running: Any, job: str) -> None:
    """Kill what works on a job; it has a model to load before there is anything that could end."""
    deadline = time.monotonic() + 60
    while running.get(f"/v1/jobs/{job}")["status"] == "queued":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for child in psutil.Process(running.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "worker.runner" in child.cmdline():
                child.send_signal(signal.SIGKILL)
