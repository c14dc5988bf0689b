"""A whole Isthmus: the API and the worker as `isthmus serve` starts them, and small data sets to give to it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ("zero", "one", "two", "three", "four", "five")


@dataclass
class Running:
    """A running service and a client of it."""

    process: subprocess.Popen[str]
    url: str
    http: httpx.Client
    data: Path

    def get(self, path: str) -> Any:
        """Get a document that must be there."""
        return self.http.get(path).raise_for_status().json()

    def post(self, path: str, document: dict[str, Any]) -> Any:
        """Post a document that must be accepted."""
        response = self.http.post(path, json=document)
        assert response.is_success, response.text
        return response.json()

    def upload(self, name: str, tar: bytes, **fields: str) -> dict[str, Any]:
        """Upload a tar and wait until it is ingested."""
        response = self.http.post(
            "/v1/datasets", data={"name": name, **fields}, files={"file": (f"{name}.tar", tar, "application/x-tar")}
        )
        assert response.status_code == 202, response.text
        dataset = response.json()
        self.wait(dataset["job_id"])
        return self.get(f"/v1/datasets/{dataset['id']}")

    def wait(self, job: str, *, status: str = "succeeded", timeout_s: float = 120) -> dict[str, Any]:
        """Wait until a job has the status, and fail at once if it ends in another."""
        deadline = time.monotonic() + timeout_s
        while (found := self.get(f"/v1/jobs/{job}"))["status"] != status:
            assert found["status"] not in {"succeeded", "failed", "cancelled"}, found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def follow(self, job: str, **headers: str) -> str:
        """Read a job's event stream to its end."""
        response = self.http.get(f"/v1/jobs/{job}/events", headers={"accept": "text/event-stream"} | headers)
        assert response.headers["content-type"].startswith("text/event-stream")
        return response.text


@contextlib.contextmanager
def _run(data: Path, **environment: str) -> Generator[Running]:
    log = data.parent / f"{data.name}.log"
    with log.open("a+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", "--data", str(data), "--port", "0"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "ISTHMUS_TICK_S": "0.2"} | environment,
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
        )
        try:
            url, http = _client(process, log)
            with http:
                yield Running(process, url, http, data)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                pytest.fail("`isthmus serve` did not stop within 30 s")
            assert process.stdout is not None
            process.stdout.close()


def _client(process: subprocess.Popen[str], log: Path) -> tuple[str, httpx.Client]:
    assert process.stdout is not None
    for line in process.stdout:
        if "is ready at " in line:
            url = line.split("is ready at ")[1].split()[0]
            return url, httpx.Client(base_url=url, timeout=60, trust_env=False)
    pytest.fail(f"`isthmus serve` ended before it was ready: {log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """Run `isthmus serve`: `with serve(folder, ISTHMUS_DATABASE_URL=...) as running`."""
    return _run


@pytest.fixture
def running(database_url: str, tmp_path: Path) -> Iterator[Running]:
    """A whole service on this test's database."""
    with _run(tmp_path / "data", ISTHMUS_DATABASE_URL=database_url) as found:
        yield found


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def picture(digit: int, rng: np.random.Generator) -> bytes:
    """Draw an 8x8 PNG: a bright bar at one of six places, with noise."""
    pixels = rng.integers(0, 40, (8, 8), dtype=np.uint8)
    pixels[:, digit + 1] = rng.integers(180, 256, 8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sound(digit: int, rng: np.random.Generator) -> bytes:
    """Play a quarter of a second of one of six tones, with noise and a random phase."""
    time_s = np.arange(2000) / 8000
    wave = 0.5 * np.sin(2 * np.pi * 250 * 1.45**digit * time_s + rng.uniform(0, 6)) + rng.normal(0, 0.02, 2000)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave.astype(np.float32), 8000, format="WAV")
    return buffer.getvalue()


def motion(digit: int, rng: np.random.Generator) -> bytes:
    """Record six readings of a three-axis sensor, turned by the digit."""
    angle = digit + rng.normal(0, 0.05, 6)
    readings = np.stack([np.cos(angle), np.sin(angle), rng.normal(0, 0.1, 6)], axis=1)
    buffer = io.BytesIO()
    np.save(buffer, readings.astype(np.float32))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pairs() -> Callable[..., bytes]:
    """Make a tar of pairs with text: `pairs("png", 240, seed=0)`; extensions png, wav and imu.npy."""

    def make(extension: str, num: int, *, seed: int = 0) -> bytes:
        rng = np.random.default_rng(seed)
        draw = {"png": picture, "wav": sound, "imu.npy": motion}[extension]
        templates = {"png": "a drawing of {}", "wav": "the sound of {}", "imu.npy": "a movement like {}"}
        members: dict[str, bytes] = {}
        for index in range(num):
            digit = index % len(DIGITS)
            members[f"{index:05d}.{extension}"] = draw(digit, rng)
            members[f"{index:05d}.txt"] = templates[extension].format(DIGITS[digit]).encode()
            members[f"{index:05d}.cls"] = DIGITS[digit].encode()
        return _tar(members)

    return make


@pytest.fixture(scope="session")
def recipe() -> Callable[..., dict[str, Any]]:
    """Write a recipe that joins image, audio and imu by text: `recipe({"image": "ds_1", ...}, steps=80)`."""

    def write(datasets: dict[str, str], *, steps: int = 80, batch_size: int = 48, **changes: Any) -> dict[str, Any]:
        tokens: dict[str, dict[str, Any]] = {
            "image": {"kind": "image", "size": 8, "patch": 4, "channels": 1},
            "audio": {"kind": "audio", "sample_rate": 8000, "window_s": 0.25, "mels": 32, "frames": 4},
            "imu": {"kind": "continuous", "dim": 3, "max_length": 8},
            "text": {"kind": "text", "method": "bytes", "max_length": 32},
        }
        size = {"width": 32, "depth": 1, "heads": 4}
        return {
            "towers": {name: size | {"tokens": tokens[name]} for name in (*datasets, "text")},
            "pairs": [{"dataset": dataset, "modalities": [name, "text"]} for name, dataset in datasets.items()],
            "dimensions": 32,
            "optimiser": {"learning_rate": 3e-3, "warmup_steps": 10},
            "budget": {"steps": steps, "batch_size": batch_size, "log_every": 5},
            "bank": {"size": 256},
        } | changes

    return write


@pytest.fixture(scope="session")
def draw() -> Callable[[str, int], list[dict[str, Any]]]:
    """Draw items as a request carries them, of no data set: `draw("image", 12)`; item i shows digit i % 6."""

    def make(modality: str, num: int) -> list[dict[str, Any]]:
        rng = np.random.default_rng(99)
        one = {"image": picture, "audio": sound}[modality]
        return [{modality: base64.b64encode(one(index % len(DIGITS), rng)).decode()} for index in range(num)]

    return make


def _read_events(text: str) -> list[dict[str, Any]]:
    """Read the events of a server-sent stream."""
    found: list[dict[str, Any]] = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in fields:
            found.append({"event": fields.get("event"), "id": fields.get("id"), "data": json.loads(fields["data"])})
    return found


@pytest.fixture(scope="session")
def read_events() -> Callable[[str], list[dict[str, Any]]]:
    """Read the events of a server-sent stream."""
    return _read_events
