"""What the tests of learning and of its jobs share: small data sets, and the runner's own context."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from service.contract.artifacts import Store, open_store
from service.contract.jobs import Input
from service.contract.samples import SampleWriter

if TYPE_CHECKING:
    from worker.runner import Context

# Read when torch is loaded: models this small are slower on several threads, and tests run beside other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True)
class Bench:
    """A store with data sets, and contexts for jobs that read them."""

    root: Path
    store: Store
    inputs: dict[str, Input]

    def publish(
        self, name: str, media: dict[str, str], samples: list[tuple[str, dict[str, bytes], str, bool]]
    ) -> Input:
        """Publish a data set and make it an input."""
        folder = self.root / f"make-{name}"
        with SampleWriter(folder) as writer:
            for sample in samples:
                writer.add(*sample)
            writer.close()
        key = f"datasets/{name}/1"
        manifest = self.store.publish(folder, key, kind="dataset", id=name, body={"modalities": media})
        self.inputs[name] = Input(artifact=key, digest=manifest.digest, id=name, kind="dataset")
        return self.inputs[name]

    def add_model(self, artifact: str, name: str = "model_a") -> None:
        """Make a model an input."""
        digest = self.store.manifest(artifact).digest
        self.inputs[name] = Input(artifact=artifact, digest=digest, id=name, kind="model")

    def context(self, job: str, *, epoch: int = 1, resume: list[str] | None = None, device: str = "cpu") -> Context:
        """Make the runner's own context; what it says lies in a file (`said`)."""
        from worker.runner import Channel, Context
        from worker.task import Task

        scratch = self.root / f"scratch-{job}-{epoch}"
        scratch.mkdir()
        task = Task.model_validate(
            {
                "job": job,
                "epoch": epoch,
                "attempt": epoch,
                "args": {"kind": "ingest", "dataset": "ds_a", "source": "x"},  # contexts do not look at it
                "inputs": self.inputs,
                "resume": resume or [],
                "store_url": str(self.root / "store"),
                "import_folders": [Path("/")],
                "scratch": scratch,
                "device": device,
                "threads": 1,
            }
        )
        descriptor = os.open(self.root / f"said-{job}-{epoch}", os.O_CREAT | os.O_WRONLY)
        return Context(task, Channel(descriptor))

    def said(self, job: str, what: str, *, epoch: int = 1) -> list[dict[str, Any]]:
        """Return what a context sent of one kind."""
        lines = (self.root / f"said-{job}-{epoch}").read_text(encoding="utf-8").splitlines()
        return [message[what] for line in lines if what in (message := json.loads(line))]


def npy(array: np.ndarray) -> bytes:
    """Write an array as a data set keeps it."""
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def make_bench(root: Path) -> Bench:
    """Publish `ds_imu` (imu, text) and `ds_codes` (codes, text): 8 classes, the modalities share nothing but the class.

    `imu` is 4 to 8 vectors around a direction of the class, `codes` 3 to 6 ids of which most are the class's own. Every
    fifth sample is held out.
    """
    bench = Bench(root, open_store(str(root / "store")), {})
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(len(WORDS), 3)) * 4 + 10
    rows: dict[str, list[tuple[str, dict[str, bytes], str, bool]]] = {"imu": [], "codes": []}
    for at in range(400):
        label = at % len(WORDS)
        vectors = centres[label] + rng.normal(size=(int(rng.integers(4, 9)), 3))
        ids = np.where(rng.random(int(rng.integers(3, 7))) < 0.8, 3 * label + rng.integers(0, 3), rng.integers(0, 24))
        text = f"{'a' if at % 3 else 'the'} {WORDS[label]}".encode()
        rows["imu"].append(
            (f"i{at}", {"imu": npy(vectors.astype(np.float32)), "text": text}, WORDS[label], at % 5 == 0)
        )
        rows["codes"].append((f"c{at}", {"codes": npy(ids.astype(np.int32)), "text": text}, WORDS[label], at % 5 == 0))
    bench.publish("ds_imu", {"imu": "continuous", "text": "text"}, rows["imu"])
    bench.publish("ds_codes", {"codes": "discrete", "text": "text"}, rows["codes"])
    return bench


def make_recipe(**changes: Any) -> Any:
    """Return a recipe for the bench's data sets: three small towers, of which no pair holds imu and codes."""
    from service.contract.recipe import Recipe

    document: dict[str, Any] = {
        "towers": {
            "imu": {"tokens": {"kind": "continuous", "dim": 3, "max_length": 8}, "width": 16, "depth": 1},
            "codes": {"tokens": {"kind": "discrete", "vocab": 24, "max_length": 8}, "width": 16, "depth": 1},
            "text": {"tokens": {"kind": "text", "max_length": 16}, "width": 16, "depth": 1},
        },
        "pairs": [
            {"dataset": "ds_imu", "modalities": ["imu", "text"]},
            {"dataset": "ds_codes", "modalities": ["codes", "text"]},
        ],
        "dimensions": 16,
        "optimiser": {"learning_rate": 5e-3, "warmup_steps": 5},
        "budget": {"steps": 240, "batch_size": 32, "checkpoint_s": 3600, "log_every": 60},
        "bank": {"size": 512},
        "seed": 3,
    }
    return Recipe.model_validate(document | changes)


@pytest.fixture
def recipe() -> Callable[..., Any]:
    """`make_recipe`."""
    return make_recipe


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Data sets in a store that is this test's alone."""
    return make_bench(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A bench with `model_a`, trained on it by the train job `job_trained`. Tests only read it."""
    from service.contract.jobs import TrainArgs
    from worker.jobs import train

    bench = make_bench(tmp_path_factory.mktemp("trained"))
    result = train.run(TrainArgs(recipe=make_recipe()), bench.context("job_trained"))
    bench.add_model(result.artifact)
    return bench
