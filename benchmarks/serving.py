"""What a request costs: `make bench-serving`, or `python -P benchmarks/serving.py`.

A whole `isthmus serve` is started and a small model trained in it; then one text is embedded over HTTP, against the
same tokeniser and tower called in this process. The limits: bare + 3 ms when idle, three times that while a job trains.
Idle rounds are interleaved with bare ones, so that a busy machine disturbs both sides alike; intervals are a bootstrap
over rounds. The tower is small on purpose: what is measured is the rest. The client is a bare socket, since a client
library's own time is of the same size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any, Final, final
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import torch

from service.contract.tokens.tokenise import TextRaw
from worker.learning.model import Loaded, load_model
from worker.learning.ragged import Ragged

ROOT: Final = Path(__file__).resolve().parents[1]
WORDS: Final = ("a dog", "two cats", "the sea", "somebody", "a red car", "snow")
CAPTIONS: Final = [f"a photo of {what} {where}" for what in WORDS for where in ("at night", "in the rain", "today")]
CONNECTIONS: Final = 64


@final
class Connection:
    """One kept-alive HTTP/1.1 connection that sends the same kind of request again and again."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Connect."""
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    async def embed(self, at: int) -> None:
        """Embed a caption, base64 as the OpenAI client asks for it."""
        caption = CAPTIONS[at % len(CAPTIONS)]
        await self.post("/v1/embeddings", {"model": "bench", "input": caption, "encoding_format": "base64"})

    async def post(self, path: str, document: dict[str, Any]) -> bytes:
        """Send a document; return the body of the answer."""
        return await self.send(path, json.dumps(document).encode())

    async def send(self, path: str, body: bytes) -> bytes:
        """Send a body of JSON; return that of the answer."""
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
        assert length is not None
        content = await self._reader.readexactly(int(length[1]))
        assert answer.startswith(b"HTTP/1.1 200 "), content
        return content

    def close(self) -> None:
        """Hang up."""
        self._writer.close()


@contextlib.contextmanager
def service(folder: Path) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """Run `isthmus serve` on a folder; yield its URL and process."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "service.cli", "serve", "--data", str(folder), "--port", "0"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield next(found[1] for line in process.stdout if (found := re.search(r"ready at (\S+)", line))), process
    finally:
        process.terminate()
        process.wait()


def pairs() -> bytes:
    """Make a tar of captions, each with a few ids."""
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for index in range(256):
            ids = io.BytesIO()
            np.save(ids, rng.integers(0, 16, 8).astype(np.int32))
            caption = CAPTIONS[index % len(CAPTIONS)].encode()
            for name, content in ((f"{index}.txt", caption), (f"{index}.code.ids.npy", ids.getvalue())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def recipe(dataset: str, steps: int, width: int, depth: int) -> dict[str, Any]:
    """Write the recipe of the model to serve, and of the job that trains beside it."""
    size = {"width": width, "depth": depth, "heads": 4}
    return {
        "towers": {
            "text": size | {"tokens": {"kind": "text", "max_length": 64}},
            "code": size | {"tokens": {"kind": "discrete", "vocab": 16, "max_length": 8}},
        },
        "pairs": [{"dataset": dataset, "modalities": ["text", "code"]}],
        "dimensions": 512,
        "budget": {"steps": steps, "batch_size": 128},
    }


def wait(http: httpx.Client, job: str, status: str) -> dict[str, Any]:
    """Wait until a job has a status."""
    while (found := http.get(f"/v1/jobs/{job}").json())["status"] != status:
        assert found["status"] not in {"failed", "cancelled"}, found
        time.sleep(0.1)
    return found


async def p50_ms(call: Callable[[int], Awaitable[None]], num: int) -> float:
    """Return the median time of one call after another, milliseconds."""
    times: list[float] = []
    for at in range(num):
        began = time.perf_counter()
        await call(at)
        times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times))


async def per_second(connections: list[Connection], num: int) -> float:
    """Return the requests per second of some connections, each asking again when it has its answer."""
    share = num // len(connections)

    async def ask(connection: Connection) -> None:
        for at in range(share):
            await connection.embed(at)

    began = time.perf_counter()
    await asyncio.gather(*map(ask, connections))
    return share * len(connections) / (time.perf_counter() - began)


def interval(values: list[float], over: list[float]) -> str:
    """Write the ratio of two medians with its bootstrap 95 % interval over rounds."""
    rng = np.random.default_rng(0)
    a, b = np.array(values), np.array(over)
    ratios = [
        np.median(a[rng.integers(0, len(a), len(a))]) / np.median(b[rng.integers(0, len(b), len(b))])
        for _ in range(2000)
    ]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return f"{np.median(a) / np.median(b):.2f} [{low:.2f}, {high:.2f}]"


async def measure(url: str, loaded: Loaded, http: httpx.Client, training: dict[str, Any], rounds: int) -> None:
    """Measure idle and beside a training job, and print the table."""

    async def bare(at: int) -> None:
        with torch.inference_mode():
            tokens = loaded.tokenisers["text"](TextRaw(CAPTIONS[at % len(CAPTIONS)]))
            loaded.model.encode("text", Ragged.from_sequences([tokens])).numpy()

    connections = [await Connection.open(url) for _ in range(CONNECTIONS)]
    one = connections[0]
    rows: dict[str, list[float]] = {name: [] for name in ("bare", "idle", "alone", "together", "busy")}
    for turn in range(rounds + 1):
        figures = {
            "bare": await p50_ms(bare, 100),
            "idle": await p50_ms(one.embed, 100),
            "alone": await per_second([one], 100),
            "together": await per_second(connections, 1280),
        }
        if turn:  # the first one warms up
            for name, figure in figures.items():
                rows[name].append(figure)
    job = http.post("/v1/jobs", json=training).json()["id"]
    wait(http, job, "running")
    await asyncio.sleep(3)
    for _ in range(rounds):
        rows["busy"].append(await p50_ms(one.embed, 100))
    http.post(f"/v1/jobs/{job}/cancel").raise_for_status()
    for connection in connections:
        connection.close()
    limit = [figure + 3.0 for figure in rows["bare"]]
    beside = [3 * figure for figure in limit]
    together = f"{interval(rows['together'], rows['alone'])} x one connection"
    for name, key, unit, ratio in (
        ("one text, bare tokenise + forward, p50", "bare", "ms", ""),
        ("one text over HTTP, idle, p50", "idle", "ms", f"{interval(rows['idle'], limit)} x (bare + 3 ms)"),
        ("one text over HTTP, a job trains, p50", "busy", "ms", f"{interval(rows['busy'], beside)} x 3 (bare + 3 ms)"),
        ("requests at 1 connection", "alone", "/s", ""),
        (f"requests at {CONNECTIONS} connections", "together", "/s", together),
    ):
        print(f"{name:<42}{np.median(rows[key]):>9.2f} {unit:<4} {ratio}")


def footprint(process: subprocess.Popen[str]) -> None:
    """Print what the API process weighs and how long its import takes."""
    children = psutil.Process(process.pid).children(recursive=True)
    api = next(child for child in children if "api" in child.cmdline())
    print(f"{'API process, resident':<42}{api.memory_info().rss / 2**20:>9.0f} MiB")
    took: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import service.app"], check=True, cwd=ROOT)
        took.append(time.perf_counter() - began)
    print(f"{'API process, import (best of 5)':<42}{min(took):>9.2f} s")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as name,
        service(Path(name)) as (url, process),
        httpx.Client(base_url=url) as http,
    ):
        dataset = http.post("/v1/datasets", data={"name": "bench"}, files={"file": ("p.tar", pairs())}).json()
        wait(http, dataset["job_id"], "succeeded")
        size = {"width": arguments.width, "depth": arguments.depth}
        served = {"kind": "train", "name": "bench", "recipe": recipe(dataset["id"], 20, **size)}
        artifact = wait(http, http.post("/v1/jobs", json=served).json()["id"], "succeeded")["result"]["artifact"]
        loaded = load_model(Path(name) / "store" / artifact, "cpu")
        training = {"kind": "train", "recipe": recipe(dataset["id"], 1_000_000, **size)}
        asyncio.run(measure(url, loaded, http, training, arguments.rounds))
        footprint(process)


if __name__ == "__main__":
    main()
