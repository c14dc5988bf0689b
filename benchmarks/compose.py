"""What composition costs: `make bench-compose`, or `python -m benchmarks.compose [--quick] [--device cuda]`.

Four parts, each peer of the first three in a process of its own:

- a: 64 sources x 10,000 bridge items x 100,000 targets of 256 dimensions, next to the plain matrix products: sources by
  bridge, bridge by targets, and the sources' masses by those scores, streamed in the very blocks of ours. `fixed` is a
  cosine's scale that needs no maxima, `maxima` one that does; then with the ten best found of a mapped file, and as a
  service answers, with sample sizes, errors and warnings;
- b: the memory of these beside their operands;
- c: next to a tensor of sources x bridge x targets, with as many targets as half of the free memory can hold;
- d: a whole `isthmus serve` over HTTP: the p50 that a composition with an embedding set of 1,000 targets adds to
  embedding its source, and the CPU time of large sets, asked for at once and by a job.

With `--device cuda` parts a to c on a GPU in float32 and in TF32, by wall time between synchronisations, and the plain
products in bf16 too.

Rounds are interleaved and compared pairwise, CPU-seconds decide in a to c, and a bar holds for the pessimistic end of a
bootstrap 95 % interval: a busy machine disturbs all sides alike. Part d is wall time, which a busy machine does raise.
The exit status is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, cast

import httpx
import numpy as np
import psutil
import torch

from benchmarks.composing import served, sums
from benchmarks.measuring import Process, Report, interval
from benchmarks.serving import CAPTIONS, Connection, service

ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait sleep: else CPU time counts how long others kept them waiting, which is no work of anybody's."""

NAMES: Final[dict[sums.Kind, str]] = {
    "products": "the plain matrix products",
    "bf16": "the plain matrix products, bf16",
    "fixed": "marginal, fixed shift",
    "maxima": "marginal, maxima",
    "ranked": "the ten best of a mapped file",
    "answered": "the same with sizes, errors, warnings",
    "broadcast": "sources x bridge x targets",
}
BARS: Final[dict[sums.Kind, float]] = {"fixed": 1.2, "maxima": 1.5}
GB: Final = 1e9
COPIES: Final = 2.5
"""Of the tensor of everything that its log-sum-exp makes, and something to spare."""
REQUESTS: Final = 50
"""Of each kind in a round of part d; of the large ones one in so many."""
FEW: Final = 10
Peers = dict[sums.Kind, Process]
Call = Callable[[int], Awaitable[object]]


def alone(
    report: Report,
    sizes: sums.Sizes,
    rounds: int,
    parts: Sequence[str],
    *,
    device: str = "cpu",
    precision: str = "fp32",
) -> None:
    """Parts a to c."""
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / "targets.npy"
        np.save(file, sums.draw(sizes.targets, sizes.dim, 3).numpy())

        def start(kind: sums.Kind) -> Process:
            arguments = (kind, str(file), device, precision, json.dumps(dataclasses.asdict(sizes)))
            process = Process("benchmarks.composing.sums", *arguments, environment=ENVIRONMENT)
            stack.callback(process.kill)
            return process

        left_out: set[sums.Kind] = {"broadcast", "bf16"} if device == "cpu" else {"broadcast"}
        peers: Peers = {}
        for kind in NAMES:
            if kind not in left_out:
                peers[kind] = start(kind)
        if {"a", "b"} & set(parts):
            streamed(report, peers, sizes.targets, rounds, parts, has_bars=device == "cpu")
        if "c" in parts:
            peers |= {"broadcast": start("broadcast")}
            naive(report, peers, sizes, rounds, device)


def streamed(report: Report, peers: Peers, num: int, rounds: int, parts: Sequence[str], *, has_bars: bool) -> None:
    """Parts a and b."""
    costs: dict[sums.Kind, list[float]] = collections.defaultdict(list)
    peaks: dict[sums.Kind, float] = {}
    turns = list(peers.items())
    for turn in range(rounds + 1):
        for kind, process in turns:
            told = process.ask(num=num)
            # The first run tells the memory, before anything lies about that can be used again.
            if turn:
                costs[kind].append(told["ms"])
            else:
                peaks[kind] = told["peak"] / GB
        random.shuffle(turns)
    report.head(f"{num:,} targets, memory beside the operands", "ms", "GB")
    for kind in peers:
        report.row(NAMES[kind], f"{np.median(costs[kind]):.0f}", f"{peaks[kind]:.3f}")
    for kind in peers:
        if "a" in parts and kind not in {"products", "bf16"}:
            name, ratio = f"time, {NAMES[kind]} / {NAMES['products']}", interval(costs[kind], costs["products"])
            if has_bars and kind in BARS:
                report.bar(name, ratio, most=BARS[kind])
            else:
                report.told(name, ratio)
    for kind, peak in peaks.items():
        if "b" in parts and kind not in {"products", "bf16"}:
            report.bar(f"memory, GB, {NAMES[kind]}", (peak, peak, peak), most=1.0)


def naive(report: Report, peers: Peers, sizes: sums.Sizes, rounds: int, device: str) -> None:
    """Part c."""
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    num = targets_within(free / 2, sizes)
    costs: dict[sums.Kind, list[float]] = collections.defaultdict(list)
    peaks: dict[sums.Kind, float] = {}
    means: dict[sums.Kind, float] = {}
    compared: tuple[sums.Kind, sums.Kind] = ("fixed", "broadcast")
    for turn in range(rounds + 1):
        for kind in compared:
            told = peers[kind].ask(num=num)
            means[kind] = told["mean"]
            if turn:
                costs[kind].append(told["ms"])
            else:
                peaks[kind] = told["peak"] / GB
    report.head(f"{num:,} targets, memory beside the operands", "ms", "GB", "mean, nats")
    for kind in compared:
        report.row(NAMES[kind], f"{np.median(costs[kind]):.0f}", f"{peaks[kind]:.3f}", f"{means[kind]:.5f}")
    report.told(f"time, {NAMES['broadcast']} / {NAMES['fixed']}", interval(costs["broadcast"], costs["fixed"]))
    off = abs(means["fixed"] - means["broadcast"])
    report.bar("how far the two means are apart, nats", (off, off, off), most=1e-4)


def targets_within(num_bytes: float, sizes: sums.Sizes) -> int:
    """Return the largest power of two of targets whose tensor of everything can be summed in so much memory."""
    each = 4 * COPIES * sizes.sources * sizes.bridge
    return min(sizes.targets, 1 << max(0, int(num_bytes // each).bit_length() - 1))


async def online(report: Report, url: str, ready: served.Served, rounds: int) -> None:
    """Part d, one request after the other."""
    connection = await Connection.open(url)
    targets = {"embeddings": ready.few}
    vector = {"embedding": ready.vectors(ready.sources)[0].tolist(), "modality": "text"}
    rows = [{"embedding": z.tolist(), "modality": "mark"} for z in ready.vectors(ready.few)]
    sent = json.dumps(served.question([vector], rows)).encode()

    async def compose(at: int) -> object:
        source = [CAPTIONS[at % len(CAPTIONS)]]
        return await connection.post("/v1/compose", served.question(source, targets) | {"source_modality": "text"})

    async def from_vector(_: int) -> object:
        return await connection.post("/v1/compose", served.question([vector], targets))

    async def from_vectors(_: int) -> object:
        return await connection.send("/v1/compose", sent)

    calls: dict[str, Call] = {
        "embed one text": connection.embed,
        f"compose it with a set of {len(rows):,}": compose,
        "compose a vector with the set": from_vector,
        f"compose a vector with {len(rows):,} vectors sent": from_vectors,
    }
    sends = list(calls)[-1]
    p50, costs = await timed(ready, calls, rounds, apart=sends)
    connection.close()
    report.head("Over HTTP, one request after the other", "p50, ms", "CPU ms")
    for name in calls:
        report.row(name, f"{np.median(p50[name]):.2f}", f"{np.median(costs[name]):.2f}")
    embed, added, *others = calls
    difference = {name: np.subtract(p50[name], p50[embed]).tolist() for name in (added, *others)}
    report.bar("ms that composing with the set adds to embedding", interval(difference[added]), most=5.0)
    spent = np.subtract(costs[added], costs[embed]).tolist()
    report.told("CPU ms that it adds, all processes and threads", interval(spent))
    for name in others:
        report.told(f"ms beside embedding, {name}", interval(difference[name]))


async def timed(
    ready: served.Served, calls: dict[str, Call], rounds: int, *, apart: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the p50 of each call in each round, and the CPU time of all the service's processes, milliseconds."""
    p50: dict[str, list[float]] = {name: [] for name in calls}
    costs: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        times: dict[str, list[float]] = {name: [] for name in calls}
        for at in range(REQUESTS):
            for name, call in calls.items():
                if name != apart:
                    times[name].append(await took_ms(call, at))
        # By itself: after 5 MB of JSON everything else is slow for a moment.
        for at in range(REQUESTS // FEW):
            times[apart].append(await took_ms(calls[apart], at))
        for name, call in calls.items() if turn else ():
            p50[name].append(float(np.median(times[name])))
            began = ready.cpu_s()
            for at in range(len(times[name])):
                await call(at)
            costs[name].append(1000 * (ready.cpu_s() - began) / len(times[name]))
    return p50, costs


async def took_ms(call: Call, at: int) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    await call(at)
    return 1000 * (time.perf_counter() - began)


def whole(report: Report, sizes: served.Sizes, rounds: int) -> None:
    """Part d."""
    with (
        tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder,
        service(Path(folder)) as (url, process),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        ready = served.Served(http, process.pid, sizes)
        asyncio.run(online(report, url, ready, rounds))
        few = max(2, rounds // 3)
        found = np.array([(ready.ask(), ready.ask_by_job()) for _ in range(few)])
    report.head(f"{sizes.sources} sources, {sizes.many:,} targets, bridge {2 * sizes.bank:,}", "CPU s")
    for name, seconds in zip(("POST /v1/compose", "a compose job, with a process's start"), found.T, strict=True):
        report.row(name, f"{np.median(seconds):.2f}")


def facts(device: str) -> None:
    """Print what was measured on."""
    print(f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {name}; load {os.getloadavg()[0]:.1f} before it began")


def main() -> None:
    """Measure, print the tables, and exit with 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.compose", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="three rounds, a fifth of the targets: wide intervals")
    parser.add_argument("--part", choices="abcd", action="append", help="only this part; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: parts a to c on a GPU")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    parts = cast("list[str]", arguments.part) or ["a", "b", "c", "d"]
    report = Report()
    sizes, large = sums.Sizes(), served.Sizes()
    if arguments.quick:
        sizes = dataclasses.replace(sizes, targets=sizes.targets // 5)
        large = dataclasses.replace(large, many=large.many // 20)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device here; without the option the CPU is measured")
    facts(arguments.device)
    precisions = ("fp32",) if arguments.device == "cpu" else ("fp32", "tf32")
    for precision in precisions if {"a", "b", "c"} & set(parts) else ():
        print(f"\n{sizes.sources} sources, bridge {sizes.bridge:,}, {sizes.dim} dimensions, {precision}")
        alone(report, sizes, rounds, parts, device=arguments.device, precision=precision)
    if "d" in parts and arguments.device == "cpu":
        whole(report, large, rounds)
    report.end()


if __name__ == "__main__":
    main()
