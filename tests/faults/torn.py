"""Saves checkpoints in a loop, to be killed: `torn.py STORE SCRATCH ROUNDS SEED`.

One process imports torch; each round forks one that looks for the newest checkpoint, takes it over, goes on saving one
step after the other, and is killed at a random moment. The parent prints one line of JSON for each round: the steps
that were told, the newest one that the next round finds, and what it passed over.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from service.contract.recipe import Optimiser, Recipe
from worker.learning import checkpoints, optim
from worker.learning.checkpoints import Checkpoints, Position
from worker.learning.model import MultiTower
from worker.runner import Channel, Context
from worker.task import Task

CPU = torch.device("cpu")
RECIPE = Recipe.model_validate(
    {
        "towers": {
            name: {"tokens": {"kind": "discrete", "vocab": 24, "max_length": 8}, "width": 128, "depth": 1}
            for name in ("a", "b")
        },
        "pairs": [{"dataset": "ds_x", "modalities": ["a", "b"]}],
        "budget": {"checkpoint_s": 0},
    }
)
DATA = {"ds_x": {"digest": "0" * 64}}


def _context(store: str, scratch: Path, epoch: int, channel: int) -> Context:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    task: dict[str, Any] = {
        "job": "job_torn",
        "epoch": epoch,
        "attempt": 1,
        "args": {"kind": "train", "recipe": RECIPE.model_dump(mode="json")},
        "inputs": {},
        "resume": [],
        "store_url": store,
        "scratch": scratch,
        "device": "cpu",
        "threads": 1,
    }
    return Context(Task.model_validate(task), Channel(channel))


def save_for_ever(context: Context) -> None:
    """Take the newest checkpoint over, check that it is the step that it says it is, and save the next ones."""
    start = checkpoints.find(context, RECIPE, DATA)
    torch.manual_seed(0)
    model = MultiTower(RECIPE, {"a": 24, "b": 24})
    optimiser = optim.build(Optimiser(), model.named_parameters())
    step = 0
    if start is not None:
        checkpoints.restore(start, model, optimiser, CPU)
        step = start.position.step
        # Each step adds one to every weight, so the weights tell the step.
        assert all(int(parameter.detach().flatten()[0]) == step for parameter in model.parameters()), step
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    for parameter in model.parameters():
        if not optimiser.state[parameter]:
            parts = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            optimiser.state[parameter] = {"step": torch.zeros(()), **parts}
    context.event("found", {"step": step})
    saved = Checkpoints(context, RECIPE, {}, DATA, start, grace_s=0.0)
    while True:
        step += 1
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        position = Position(step=step, drawn=[step], environment={})
        saved.save(model, optimiser, position, CPU, {})


def main() -> None:
    """Play the rounds."""
    store, scratch, rounds, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    optim.build(Optimiser(), MultiTower(RECIPE, {"a": 24, "b": 24}).named_parameters())  # imports what it needs, once
    for epoch in range(1, rounds + 1):
        read_end, write_end = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(read_end)
            context = _context(store, scratch, epoch, write_end)
            save_for_ever(context)
        os.close(write_end)
        said = b""
        while b'"found"' not in said and (block := os.read(read_end, 1 << 16)):
            said += block
        time.sleep(rng.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        while block := os.read(read_end, 1 << 16):
            said += block
        os.close(read_end)
        messages = [json.loads(line) for line in said.split(b"\n")[:-1]]
        events = [message["event"] for message in messages if "event" in message]
        told = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "found": next((event["detail"]["step"] for event in events if event["type"] == "found"), None),
            "skipped": [event["detail"] for event in events if event["type"] == "checkpoint_skipped"],
            "saved": [message["checkpoint"]["step"] for message in messages if "checkpoint" in message],
            "aside": sum(1 for _ in Path(store, ".tmp").glob("*")),
        }
        print(json.dumps(told), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
