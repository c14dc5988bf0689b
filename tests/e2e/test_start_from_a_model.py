"""A second training goes on from the model of a first one, with the real processes."""

from __future__ import annotations

from typing import Any

import numpy as np


def test_a_new_modality_learns_to_meet_a_locked_one(running: Any, pairs: Any, recipe: Any, read_events: Any) -> None:
    drawings = running.upload("drawings", pairs("png", 120))["id"]
    movements = running.upload("movements", pairs("imu.npy", 120, seed=2))["id"]
    first = recipe({"image": drawings}, steps=20)
    job = running.post("/v1/jobs", {"kind": "train", "name": "first", "recipe": first})
    running.wait(job["id"])

    second = recipe({"imu": movements}, steps=20)
    second["towers"]["text"] = first["towers"]["text"] | {"init_from": {"model": "first"}, "locked": True}
    second["budget"]["checkpoint_s"] = 0
    job = running.post("/v1/jobs", {"kind": "train", "name": "second", "recipe": second})
    events = read_events(running.follow(job["id"]))
    assert events[-1]["data"]["status"] == "succeeded", events[-1]
    assert running.http.delete("/v1/models/first").status_code == 200  # nothing needs it any more

    third = recipe({"imu": movements}, steps=20, optimiser={"learning_rate": 1e-4})
    for name in ("imu", "text"):
        third["towers"][name] = second["towers"][name] | {
            "init_from": {"model": f"{job['id']}@latest" if name == "imu" else "second"},
            "locked": False,
            "lora": {"rank": 2},
        }
    last = running.post("/v1/jobs", {"kind": "train", "name": "third", "recipe": third})
    running.wait(last["id"])
    vectors = {
        name: running.post("/v1/embeddings", {"model": name, "input": ["a movement of one"]})["data"][0]["embedding"]
        for name in ("second", "third")
    }
    cosine = float(np.dot(vectors["second"], vectors["third"]))
    assert 0.8 < cosine < 0.999999  # it has moved on, from there
