"""Jobs that misbehave, run by real runners in place of ingest: the source of the data set says how."""

from __future__ import annotations

import importlib.util
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import NoReturn

import numpy as np

from service.contract.jobs import IngestArgs, IngestResult, Reject
from tests.faults.ledger import Ledger
from tests.supervisors import ROOT
from worker.runner import Context

HOG = "import time; kept = b'x' * (96 << 20); print('ready', flush=True); time.sleep(600)"


def run(args: IngestArgs, context: Context) -> IngestResult:
    """Do what `odd:<what>[:<figure>]` says; any other source is ingested as ever."""
    ledger = Ledger(Path(os.environ["ISTHMUS_LEDGER"]))
    ledger.write("start", context.job, context.epoch, context.attempt)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    match args.source.split(":"):
        case ["odd", "done"]:
            found = _result(args, context, 0)
        case ["odd", "wait", path]:  # for a file, which may be named after the epoch; obedient all the while
            context.progress(1, None)
            while not Path(path.format(epoch=context.epoch)).exists():
                context.check()
                time.sleep(0.02)
            found = _result(args, context, 0)
        case ["odd", "hang"]:
            _say_and_hang(context)
        case ["odd", "hold", seconds]:
            _hold(float(seconds), context)
            found = _result(args, context, 0)
        case ["odd", "obey"]:
            _start_hog()
            context.progress(1, None)
            while True:
                context.check()
                time.sleep(0.05)
        case ["odd", "defy"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _start_hog()
            _say_and_hang(context)
        case ["odd", "exit", status]:
            os._exit(int(status))
        case ["odd", "signal", number]:
            os.kill(os.getpid(), int(number))
            _say_and_hang(context)
        case ["odd", "large", num_bytes]:
            found = _result(args, context, int(num_bytes))
        case _:
            found = _ingest(args, context)
    ledger.write("finish", context.job, context.epoch, context.attempt)
    return found


def _start_hog() -> None:
    """Start a process that keeps memory and that nobody here ends."""
    hog = subprocess.Popen([sys.executable, "-c", HOG], stdout=subprocess.PIPE)
    assert hog.stdout is not None
    hog.stdout.readline()


def _say_and_hang(context: Context) -> NoReturn:
    context.progress(1, None)
    while True:
        time.sleep(60)


def _hold(seconds: float, context: Context) -> None:
    """Hold the interpreter's lock in one call of C, so that no other thread of this process gets a turn."""
    num = 10_000_000
    started = time.perf_counter()
    deque(itertools.repeat(None, num), maxlen=0)
    rate = num / (time.perf_counter() - started)
    context.progress(1, None)
    deque(itertools.repeat(None, int(rate * seconds)), maxlen=0)
    # And compute in C without it, on all threads.
    matrix = np.ones((1024, 1024))
    until = time.monotonic() + seconds / 2
    while time.monotonic() < until:
        matrix = matrix @ matrix / 1024


def _result(args: IngestArgs, context: Context, num_bytes: int) -> IngestResult:
    rejects = [Reject(key="k", reason="r" * 1000)] * (num_bytes // 1000)
    return IngestResult(
        artifact=f"datasets/{args.dataset}/{context.epoch}",
        num_samples=1,
        num_rejected=len(rejects),
        rejects=rejects,
        modalities={},
        splits={},
        labels=[],
        statistics={},
        digest="0" * 64,
        num_bytes=0,
    )


def _ingest(args: IngestArgs, context: Context) -> IngestResult:
    spec = importlib.util.spec_from_file_location("real_ingest", ROOT / "worker" / "jobs" / "ingest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.run(args, context)
