"""What training costs: `make bench-training`, or `python -m benchmarks.training [--quick] [--device cuda]`.

Three parts, on the CPU, each peer in a process of its own:

- a: our train job, loader and all, next to a bare PyTorch loop that trains the same model on the same batches;
- b: the same next to open_clip's towers and loss, at the same width, depth, heads, patches, context and batch;
- c: the loss alone, time and memory, next to plain autograd and to the matrix products that it consists of.

With `--device cuda` instead: samples per second and model FLOP utilisation of CLIP's ViT-B/32, and what fits.

Rounds are interleaved and compared pairwise, CPU-seconds decide, and a bar holds for the pessimistic end of a bootstrap
95 % interval: a busy machine disturbs all sides alike. The exit status is 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.measuring import Process, Report, interval
from benchmarks.training_peers import open_clip, scale, task

PEERS: Final = {"ours": "our train job", "bare": "bare loop, data in memory", "open_clip": "open_clip, data in memory"}
ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait sleep: else CPU time counts how long others kept them waiting, which is no work of anybody's."""

REAL: Final = task.Size(
    "towers of 4 blocks of 256, pictures of 64 by 64, 32 ids",
    width=256,
    depth=4,
    heads=4,
    image=64,
    patch=8,
    context=32,
    dimensions=256,
    batch=64,
    steps=5,
)
TINY: Final = task.Size(
    "the demo's towers: 2 blocks of 64, pictures of 8 by 8, 32 ids",
    width=64,
    depth=2,
    heads=4,
    image=8,
    patch=4,
    context=32,
    dimensions=64,
    batch=128,
    steps=20,
)

SMALL, MIDDLE, LARGE = 1024, 8192, 32_768
LOSSES: Final = {
    "ours": "InfoNCE, ours",
    "dense": "InfoNCE, plain autograd",
    "products": "the three matrix products",
    "sigmoid": "sigmoid, ours",
}
MIB: Final = 1 << 20


def loops(size: task.Size, peers: Collection[str], rounds: int, report: Report, *, has_bars: bool) -> None:
    """Parts a and b: turns of a few steps."""
    costs: dict[str, list[float]] = collections.defaultdict(list)
    peaks: dict[str, list[float]] = collections.defaultdict(list)
    rates: dict[str, list[float]] = collections.defaultdict(list)
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder, contextlib.ExitStack() as stack:
        root = task.publish(Path(folder), size)
        processes = {
            name: Process(f"benchmarks.training_peers.{name}", str(root), environment=ENVIRONMENT) for name in peers
        }
        for process in processes.values():
            stack.callback(process.kill)
        turns = list(processes.items())
        for turn in range(rounds + 1):
            for name, process in turns:
                told = process.ask(steps=size.steps)
                if not turn:  # it warms up, and reads the data set for the first time
                    losses[name] = told["loss"]
                    continue
                costs[name].append(told["cpu_ms"])
                peaks[name].append(told["peak"] / MIB)
                rates[name].append(told["rate"])
            random.shuffle(turns)
    print(f"\n{size.name}; batches of {size.batch}, fp32")
    report.head("", "CPU ms", "samples/s", "peak MiB", "first loss")
    for name in processes:
        cells = [f"{np.median(rows[name]):.{digits}f}" for rows, digits in ((costs, 3), (rates, 0), (peaks, 0))]
        report.row(PEERS[name], *cells, f"{losses[name]:.5f}")
    print("CPU time per sample, and peak memory, ours over theirs")
    for name, most in (("bare", 1.05), ("open_clip", 1.02)):
        if name in processes:
            ratio = interval(costs["ours"], costs[name])
            if has_bars:
                report.bar(f"our train job / {PEERS[name]}", ratio, most=most)
            else:
                report.told(f"our train job / {PEERS[name]}", ratio)
            report.told(f"our train job / {PEERS[name]}, memory", interval(peaks["ours"], peaks[name]))


def alone(rounds: int, report: Report) -> None:
    """Part c: the loss, forward and backward."""
    costs: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    peaks: dict[tuple[str, int], float] = {}
    with contextlib.ExitStack() as stack:
        turns: list[tuple[tuple[str, int], Process]] = []
        for batch in (SMALL, MIDDLE):
            for kind in LOSSES:
                process = start(kind, batch)
                stack.callback(process.kill)
                turns.append(((kind, batch), process))
        for turn in range(rounds + 1):
            for (kind, batch), process in turns:
                # Its first run tells the memory, before anything lies about that can be used again.
                told = process.ask(times=max(1, MIDDLE // batch) if turn else 1)
                if turn:
                    costs[kind, batch].append(told["cpu_ms"])
                else:
                    peaks[kind, batch] = told["peak"] / MIB
            random.shuffle(turns)
    for kind in ("ours", "sigmoid"):
        process = start(kind, LARGE)
        told = process.ask(times=1)
        process.kill()
        costs[kind, LARGE].append(told["cpu_ms"])
        peaks[kind, LARGE] = told["peak"] / MIB
    columns = [f"{batch // 1024}k, {what}" for batch in (SMALL, MIDDLE, LARGE) for what in ("CPU ms", "MiB")]
    report.head("A loss of 512 dimensions, memory beside vectors", *columns)
    for kind, name in LOSSES.items():
        cells = [
            cell
            for batch in (SMALL, MIDDLE, LARGE)
            for cell in (
                (f"{np.median(costs[kind, batch]):.1f}", f"{peaks[kind, batch]:.0f}")
                if (kind, batch) in peaks
                else ("-", "-")
            )
        ]
        report.row(name, *cells)
    print("32k was run once")
    for other, most in (("dense", 0.6), ("products", 1.5)):
        ratio = interval(costs["ours", MIDDLE], costs[other, MIDDLE])
        report.bar(f"CPU time at 8k, ours / {LOSSES[other]}", ratio, most=most)
    growth, gigabytes = peaks["ours", LARGE] / peaks["ours", MIDDLE], peaks["ours", LARGE] * MIB / 1e9
    report.bar("memory at 32k / at 8k, linear within a tenth", (growth, growth, growth), most=4.4)
    report.bar("memory at 32k, GB", (gigabytes, gigabytes, gigabytes), most=1.0)


def start(kind: str, batch: int) -> Process:
    """Start the process of a loss."""
    return Process("benchmarks.training_peers.loss", kind, str(batch), environment=ENVIRONMENT)


def on_device(report: Report, num_steps: int, peak_tflops: float | None) -> None:
    """Part d: ViT-B/32 in bf16 on a GPU, not compiled; then the lines for docs/log.md."""
    if not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device here; without the option the CPU is measured")
    name = torch.cuda.get_device_name()
    known = next((peak for part, peak in scale.PEAK_TFLOPS.items() if part in name), None)
    tflops = peak_tflops or known
    print(f"{name}, {f'{tflops:g} TFLOP/s in bf16' if tflops else 'peak unknown: give --peak-tflops'}")
    report.head("ViT-B/32, bf16", "samples/s", "MFU", "peak GiB")

    def row(batch: int, micro_batch: int | None) -> str | None:
        told = scaled(batch, micro_batch, num_steps)
        label = f"batch {batch:,}, " + (f"micro-batches of {micro_batch:,}" if micro_batch else "whole")
        if not told["fits"]:
            report.row(label, "-", "-", "too large")
            return None
        share = scale.utilisation(told["rate"], scale.sample_flops(scale.recipe(micro_batch), batch), tflops or 1)
        cells = (f"{told['rate']:,.0f}", f"{share:.3f}" if tflops else "-", f"{told['peak'] / (1 << 30):.1f}")
        report.row(label, *cells)
        return f"{label}: {cells[0]} samples/s, MFU {cells[1]}, {cells[2]} GiB"

    lines = [line for line in (row(4096, 1024), row(32_768, 1024)) if line]
    largest, batch = "", 1024
    while line := row(batch, None):
        largest, batch = line, 2 * batch
    print("\nFor docs/log.md:\n")
    print(
        f"- `python -m benchmarks.training --device cuda` on {name}, torch {torch.__version__}, ViT-B/32, not compiled:"
    )
    for line in (*lines, f"the largest that fits, {largest or 'none from 1,024 on'}"):
        print(f"  {line};")


def scaled(batch: int, micro_batch: int | None, num_steps: int) -> dict[str, Any]:
    """Measure one batch size in a process of its own."""
    command = json.dumps({"batch": batch, "micro_batch": micro_batch, "steps": num_steps})
    process = Process("benchmarks.training_peers.scale", command)
    try:
        return process.hear()
    finally:
        process.kill()


def facts() -> None:
    """Print what was measured on."""
    theirs = importlib.metadata.version("open_clip_torch") if open_clip.is_installed() else "not installed"
    print(f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, open_clip_torch {theirs}")


def main() -> None:
    """Measure, print the tables, and exit with 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="three rounds: wide intervals")
    parser.add_argument("--part", choices="abc", action="append", help="only this part; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: ViT-B/32 instead of the parts")
    parser.add_argument("--peak-tflops", type=float, help="what a device that is not known can do in bf16")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else arguments.rounds
    report = Report()
    facts()
    if arguments.device == "cuda":
        on_device(report, rounds, arguments.peak_tflops)
        return
    parts = arguments.part or ["a", "b", "c"]
    if "b" in parts and not open_clip.is_installed():
        sys.exit("part b needs open_clip: `make bench-training` installs it; --part a and --part c do without")
    peers = ["ours", *(name for name, part in (("bare", "a"), ("open_clip", "b")) if part in parts)]
    if len(peers) > 1:
        loops(REAL, peers, rounds, report, has_bars=True)
        loops(TINY, peers, rounds, report, has_bars=False)
    if "c" in parts:
        alone(rounds, report)
    report.end()


if __name__ == "__main__":
    main()
