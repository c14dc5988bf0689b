"""Fixtures for inference: small models to publish, and real inference processes to serve them.

Nothing of torch is imported at the top: the tests of the API run without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from service.contract.artifacts import Store
    from service.contract.wire import ModelRef


@pytest.fixture(scope="session")
def publish_model() -> Callable[..., ModelRef]:
    """Publish a small untrained model: `publish_model(store, "models/a/1", seed=1)`.

    It has the towers image, text, state (continuous) and code (discrete), the pairs image+text, state+text and
    code+text, and banks of 48 items.
    """
    return _publish_model


def _publish_model(
    store: Store,
    key: str,
    *,
    seed: int = 0,
    keep: str = "items",
    width: int = 16,
    log_scales: dict[str, float] | None = None,
    loss: dict[str, Any] | None = None,
    dimensions: int = 8,
) -> ModelRef:
    import numpy as np
    import torch

    from service.contract.recipe import Recipe
    from service.contract.tokens import text
    from service.contract.wire import ModelRef
    from worker.learning.model import Bank, MultiTower, build_tokenisers, save_model, vocab_sizes
    from worker.learning.ragged import Ragged

    size = {"width": width, "heads": 2, "depth": 1}
    # The square loss fits to a tower that is another model's; here that is only said.
    locked = {"init_from": {"model": "model_x"}, "locked": True} if loss and loss["kind"] == "square" else {}
    recipe = Recipe.model_validate(
        {
            "towers": {
                "image": size | {"tokens": {"kind": "image", "size": 8, "patch": 4, "channels": 1}},
                "text": size | locked | {"tokens": {"kind": "text", "method": "bytes", "vocab": 260, "max_length": 32}},
                "state": size | {"tokens": {"kind": "continuous", "dim": 3, "max_length": 8}},
                "code": size | {"tokens": {"kind": "discrete", "vocab": 50, "max_length": 64}},
            },
            "pairs": [
                {"dataset": "ds_a", "modalities": ["image", "text"]},
                {"dataset": "ds_b", "modalities": ["state", "text"]},
                {"dataset": "ds_c", "modalities": ["code", "text"]},
            ],
            "dimensions": dimensions,
            "loss": loss,
            "seed": seed,
        }
    )
    files = {"text": text.train(["a caption"], recipe.towers["text"].tokens)}  # pyright: ignore[reportArgumentType]
    tokenisers = build_tokenisers(recipe, files)
    torch.manual_seed(seed)
    model = MultiTower(recipe, vocab_sizes(recipe, tokenisers)).eval()
    for name, log_scale in model.log_scales.items():
        log_scale.data.fill_((log_scales or {}).get(name, 1.5))
    rng = np.random.default_rng(seed)
    banks: dict[str, Bank] = {}
    for name in model.log_scales:
        bank = Bank(vectors={})
        for modality in name.split("+"):
            ragged = Ragged.from_sequences([[_draw_tokens(rng, modality)] for _ in range(48)])
            with torch.inference_mode():
                bank.vectors[modality] = model.encode(modality, ragged)
            if keep == "items":
                bank.items[modality] = ragged
        banks[name] = bank
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        body = save_model(
            model, path, recipe=recipe, tokeniser_files=files, banks={} if keep == "none" else banks, extra={}
        )
        manifest = store.publish(path, key, kind="model", id=key.split("/")[1], body=body)
    return ModelRef(artifact=key, digest=manifest.digest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a module's store and sockets."""
    return tmp_path_factory.mktemp("inference")


@pytest.fixture(scope="module")
def models(folder: Path) -> Store:
    """The store of a module's models, in `folder / "store"`."""
    from service.contract.artifacts import open_store

    return open_store(str(folder / "store"))


@pytest.fixture(scope="module")
def model(models: Store, publish_model: Callable[..., ModelRef]) -> ModelRef:
    """A small untrained model in that store."""
    return publish_model(models, "models/model_a/1", seed=1)


@pytest.fixture(scope="session")
def draw_tokens() -> Callable[..., Any]:
    """Draw a token sequence of one of the modalities of `publish_model`: `draw_tokens(rng, "text")`."""
    return _draw_tokens


def _draw_tokens(rng: Any, modality: str) -> Any:
    import numpy as np

    match modality:
        case "image":
            return rng.integers(0, 256, (4, 16), dtype=np.uint8)
        case "text":
            return np.array([1, *rng.integers(4, 260, rng.integers(1, 20)), 2], np.int32)
        case "state":
            return rng.normal(size=(rng.integers(1, 9), 3)).astype(np.float32)
        case _:
            return rng.integers(0, 50, rng.integers(1, 65)).astype(np.int32)


@dataclass
class Inference:
    """A real inference process, and a client on its endpoint."""

    process: subprocess.Popen[bytes]
    endpoint: str
    client: httpx.Client

    def control(self, line: dict[str, Any]) -> None:
        """Write a control line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def metric(self, name: str) -> float:
        """Read one of its metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"isthmus_inference_{name} "))

    def kill(self) -> None:
        """Kill it as the kernel would."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def run_inference() -> Callable[..., contextlib.AbstractContextManager[Inference]]:
    """Run an inference process: `with run_inference(store_path, "unix:/path") as inference`."""
    return _run_inference


@contextlib.contextmanager
def _run_inference(
    store: Path, endpoint: str, *arguments: str, environment: dict[str, str] | None = None
) -> Generator[Inference]:
    command = [sys.executable, "-P", "-m", "worker.serving", "--endpoint", endpoint, "--store", str(store)]
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [*command, "--device", "cpu", *arguments],
        stdin=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(root)} | (environment or {}),
    )
    transport = None
    if endpoint.startswith("unix:"):
        transport = httpx.HTTPTransport(uds=endpoint.removeprefix("unix:"))
    url = "http://worker" if transport else f"http://{endpoint}"
    with httpx.Client(transport=transport, base_url=url, timeout=30) as client:
        inference = Inference(process, endpoint, client)
        try:
            _wait_until_ready(inference)
            yield inference
        finally:
            inference.kill()
            assert process.stdin is not None
            process.stdin.close()


def _wait_until_ready(inference: Inference) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert inference.process.poll() is None, "the inference process ended"
        if _accepts(inference.endpoint) and inference.client.get("/readyz").status_code == 200:
            return
        time.sleep(0.05)
    pytest.fail("the inference process did not become ready")


def _accepts(endpoint: str) -> bool:
    is_unix = endpoint.startswith("unix:")
    with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET) as probe:
        host, _, port = endpoint.rpartition(":")
        return probe.connect_ex(endpoint.removeprefix("unix:") if is_unix else (host, int(port))) == 0
