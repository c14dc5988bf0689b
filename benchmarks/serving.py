"""What a request costs: `python -P benchmarks/serving.py`.

One text through the gateway and a real inference process, against the same tokeniser and tower called in this
process; and requests per second at 64 connections against one. Rounds are interleaved, so that a busy machine disturbs
both sides alike; the interval is a bootstrap over rounds. The tower is small on purpose: what is measured is the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sqlalchemy as sa
import torch

from service.contract.artifacts import open_store
from service.contract.dialects import now, open_engine
from service.contract.host import boot_id
from service.contract.recipe import Recipe
from service.contract.settings import Settings
from service.contract.tables import metadata, worker
from service.contract.tokens import text
from service.contract.tokens.tokenise import TextRaw
from service.contract.wire import ModelRef
from service.inference.gateway import Gateway
from worker.learning.model import Loaded, MultiTower, build_tokenisers, load_model, save_model, vocab_sizes
from worker.learning.ragged import Ragged

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = [f"a photo of {what} {where}" for what in ("a dog", "two cats", "the sea") for where in ("at night", "")]
CONNECTIONS = 64


@dataclass
class Subject:
    """The same model twice: here, and behind the gateway."""

    gateway: Gateway
    ref: ModelRef
    loaded: Loaded

    def tokens(self, at: int) -> list[np.ndarray]:
        """Tokenise a caption."""
        return self.loaded.tokenisers["text"](TextRaw(CAPTIONS[at % len(CAPTIONS)]))

    async def bare(self, at: int) -> None:
        """Tokenise and run the tower here."""
        with torch.inference_mode():
            self.loaded.model.encode("text", Ragged.from_sequences([self.tokens(at)])).numpy()

    async def served(self, at: int) -> None:
        """Tokenise here, and let the inference process do the rest."""
        await self.gateway.embed(self.ref, "text", [self.tokens(at)])


def publish(folder: Path, width: int, depth: int) -> ModelRef:
    """Publish an untrained model."""
    size = {"width": width, "depth": depth, "heads": 4}
    recipe = Recipe.model_validate(
        {
            "towers": {
                "text": size | {"tokens": {"kind": "text", "method": "bytes", "vocab": 260, "max_length": 64}},
                "code": size | {"tokens": {"kind": "discrete", "vocab": 16, "max_length": 16}},
            },
            "pairs": [{"dataset": "ds", "modalities": ["text", "code"]}],
            "dimensions": 512,
        }
    )
    tokens = recipe.towers["text"].tokens
    assert tokens.kind == "text"
    files = {"text": text.train(CAPTIONS, tokens)}
    model = MultiTower(recipe, vocab_sizes(recipe, build_tokenisers(recipe, files)))
    body = save_model(model, folder / "model", recipe=recipe, tokeniser_files=files, banks={}, extra={})
    store = open_store(str(folder / "store"))
    manifest = store.publish(folder / "model", "models/model_bench/1", kind="model", id="model_bench", body=body)
    return ModelRef(artifact="models/model_bench/1", digest=manifest.digest)


@contextlib.asynccontextmanager
async def subject(width: int, depth: int) -> AsyncGenerator[Subject]:
    """Start an inference process and a gateway that knows it."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        ref = publish(folder, width, depth)
        endpoint = f"unix:{folder / 'socket'}"
        engine = open_engine(f"sqlite:///{folder / 'isthmus.db'}")
        stack.callback(engine.dispose)
        metadata.create_all(engine)
        row = {"id": "w", "lanes": ["serve"], "kinds": [], "host": "here", "boot": boot_id(), "pid": 1, "version": "0"}
        with engine.begin() as connection:
            connection.execute(sa.insert(worker).values(**row, endpoint=endpoint, last_seen=now()))
        command = [sys.executable, "-P", "-m", "worker.serving", "--endpoint", endpoint]
        process = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs yet
            [*command, "--store", str(folder / "store"), "--device", "cpu"],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        gateway = Gateway(Settings(worker_ttl_s=86_400), engine)
        await gateway.start()
        try:
            while not await gateway.ready():  # noqa: ASYNC110  # the gateway has no event to wait for
                await asyncio.sleep(0.1)
            yield Subject(gateway, ref, load_model(folder / "store" / ref.artifact, "cpu"))
        finally:
            await gateway.stop()


async def p50_ms(call: Callable[[int], Awaitable[None]], num: int) -> float:
    """Return the median time of one call after another, milliseconds."""
    times: list[float] = []
    for at in range(num):
        began = time.perf_counter()
        await call(at)
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))


async def per_second(call: Callable[[int], Awaitable[None]], num: int, connections: int) -> float:
    """Return the calls per second of some connections, each asking again when it has its answer."""

    async def ask() -> None:
        for at in range(num // connections):
            await call(at)

    began = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(connections)))
    return (num // connections) * connections / (time.perf_counter() - began)


def interval(values: list[float], over: list[float]) -> str:
    """Write the ratio of two medians with its bootstrap 95 % interval over rounds."""
    rng = np.random.default_rng(0)
    a, b = np.array(values), np.array(over)
    draws = rng.integers(0, len(a), (2000, len(a)))
    low, high = np.quantile(np.median(a[draws], axis=1) / np.median(b[draws], axis=1), [0.025, 0.975])
    return f"{np.median(a) / np.median(b):.2f} [{low:.2f}, {high:.2f}]"


async def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=640, help="per round and side")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bare: list[float] = []
    served: list[float] = []
    alone: list[float] = []
    together: list[float] = []
    async with subject(arguments.width, arguments.depth) as it:
        for round_number in range(arguments.rounds + 1):
            few = max(20, arguments.requests // 8)
            figures = (
                await p50_ms(it.bare, few),
                await p50_ms(it.served, few),
                await per_second(it.served, few, 1),
                await per_second(it.served, arguments.requests, CONNECTIONS),
            )
            if round_number:  # the first one warms up
                for found, figure in zip((bare, served, alone, together), figures, strict=True):
                    found.append(figure)
    rows = [
        ("one text, bare tokenise + forward, p50", f"{np.median(bare):.2f} ms", ""),
        ("one text, through the gateway, p50", f"{np.median(served):.2f} ms", f"{interval(served, bare)} x bare"),
        ("requests at 1 connection", f"{np.median(alone):.0f} /s", ""),
        (f"requests at {CONNECTIONS} connections", f"{np.median(together):.0f} /s", f"{interval(together, alone)} x 1"),
    ]
    for name, figure, ratio in rows:
        print(f"{name:<42}{figure:>12}   {ratio}")


if __name__ == "__main__":
    asyncio.run(main())
