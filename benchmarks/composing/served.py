"""Compositions as users ask for them: a whole service, with a model, its banks, and embedding sets that jobs made."""

from __future__ import annotations

import io
import tarfile
import time
from dataclasses import dataclass
from typing import Any, Final, final

import httpx
import numpy as np
import psutil

from benchmarks.serving import CAPTIONS, wait

DIMENSIONS: Final = 256
CLASSES: Final = 64
LENGTH: Final = 8
MODALITIES: Final = ("text", "code", "mark")
SAMPLES: Final = 8192
"""To train with, and to draw the banks from."""
STEPS: Final = 100
STILL_S: Final = 0.5


@final
@dataclass(frozen=True)
class Sizes:
    """How many there are of each."""

    sources: int = 64
    few: int = 1000
    many: int = 100_000
    bank: int = 4096
    """Of a pair, as by default: the bridge between two pairs is made of both banks."""


@final
class Served:
    """A service that is ready to be asked."""

    def __init__(self, http: httpx.Client, root: int, sizes: Sizes) -> None:
        """Train a model, and embed what it is asked about; `root` is the service's process."""
        self._http, self._root = http, psutil.Process(root)
        samples = self._ingest("train", SAMPLES, MODALITIES)
        tokens = {"kind": "discrete", "vocab": 4 * CLASSES, "max_length": LENGTH}
        size = {"width": 64, "depth": 2, "heads": 4}
        recipe = {
            "towers": {
                name: size | {"tokens": {"kind": "text", "max_length": 64} if name == "text" else tokens}
                for name in MODALITIES
            },
            "pairs": [{"dataset": samples, "modalities": pair} for pair in (MODALITIES[:2], MODALITIES[1:])],
            "dimensions": DIMENSIONS,
            "bank": {"size": sizes.bank},
            "budget": {"steps": STEPS, "batch_size": 128},
        }
        self._job({"kind": "train", "name": "bench", "recipe": recipe})
        self.sources = self._embed(self._ingest("sources", sizes.sources, ("text",)), "text")
        self.few = self._embed(self._ingest("few", sizes.few, ("mark",)), "mark")
        self.many = self._embed(self._ingest("many", sizes.many, ("mark",)), "mark")

    def vectors(self, embeddings: str) -> np.ndarray:
        """Download a set."""
        answer = self._http.get(f"/v1/embedding-sets/{embeddings}/files/vectors.npy").raise_for_status()
        return np.load(io.BytesIO(answer.content))

    def ask(self) -> float:
        """Ask for the best of many for all sources at once; return the CPU seconds of all the service's processes."""
        began = self._still_cpu_s()
        document = question({"embeddings": self.sources}, {"embeddings": self.many})
        self._http.post("/v1/compose", json=document, timeout=600).raise_for_status()
        return self._still_cpu_s() - began

    def ask_by_job(self) -> float:
        """Let a job do the same; the start of a process that waits for the next job is paid too."""
        began = self._still_cpu_s()
        self._job(question({"embeddings": self.sources}, {"embeddings": self.many}) | {"kind": "compose"})
        return self._still_cpu_s() - began

    def _ingest(self, name: str, num: int, modalities: tuple[str, ...]) -> str:
        file = tar(num, modalities, seed=len(name))
        given = self._http.post("/v1/datasets", data={"name": name}, files={"file": ("s.tar", file)}, timeout=600)
        dataset = given.raise_for_status().json()
        wait(self._http, dataset["job_id"], "succeeded")
        return dataset["id"]

    def _embed(self, dataset: str, modality: str) -> str:
        done = self._job({"kind": "embed", "model": "bench", "dataset": dataset, "modality": modality})
        return str(done["result"]["artifact"]).split("/")[1]

    def _job(self, document: dict[str, Any]) -> dict[str, Any]:
        job = self._http.post("/v1/jobs", json=document).raise_for_status().json()["id"]
        return wait(self._http, job, "succeeded")

    def cpu_s(self) -> float:
        """Return the CPU time of all the service's processes until now, ended ones included; seconds."""
        return sum(sum(process.cpu_times()[:4]) for process in (self._root, *self._root.children(recursive=True)))

    def _still_cpu_s(self) -> float:
        """Wait until nothing is left to do first."""
        before = -1.0
        while (now := self.cpu_s()) - before > STILL_S / 10:
            before = now
            time.sleep(STILL_S)
        return now


def tar(num: int, modalities: tuple[str, ...], *, seed: int) -> bytes:
    """Make a tar of samples of some classes: captions, and ids of which hardly any two rows are alike."""
    buffer, rng = io.BytesIO(), np.random.default_rng(seed)
    with tarfile.open(fileobj=buffer, mode="w") as out:
        for at in range(num):
            kind = at % CLASSES
            for name in modalities:
                ids = io.BytesIO()
                np.save(ids, (4 * kind + rng.integers(0, 4, LENGTH)).astype(np.int32))
                caption = f"{CAPTIONS[kind % len(CAPTIONS)]}, number {kind}, taken as {at}".encode()
                member = tarfile.TarInfo(f"{at}.txt" if name == "text" else f"{at}.{name}.ids.npy")
                content = caption if name == "text" else ids.getvalue()
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def question(source: Any, target: Any) -> dict[str, Any]:
    """Write a composition."""
    return {
        "model": "bench",
        "source": source,
        "target": target,
        "through": MODALITIES[1],
        "method": "marginal",
        "top_k": 10,
    }
