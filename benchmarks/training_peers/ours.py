"""Our own training: the real train job, with its data set and its loader, stopped between turns."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import final

from benchmarks.training_peers.task import NAME, read_task
from benchmarks.training_peers.turns import Turns
from service.contract.jobs import TrainArgs
from service.contract.recipe import Budget, Recipe
from worker.jobs import train
from worker.runner import Channel, Context
from worker.task import Task


@final
class Stops:
    """Stands where the job reports progress and metrics: there a turn ends, and the next one is waited for."""

    def __init__(self, context: Context, recipe: Recipe) -> None:
        self._progress: Callable[..., None] = context.progress
        self._metric: Callable[..., None] = context.metric
        self._batch_size = (recipe.budget or Budget()).batch_size
        self._turns = Turns()
        self._loss = 0.0
        self._until = self._turns.begin()

    def metric(self, step: int, values: dict[str, float]) -> None:
        """Record figures at a step."""
        self._metric(step, values)
        self._loss = values["loss/image+text"]

    def progress(self, done: int, total: int | None, eta_s: float | None = None) -> None:
        """Say how much is done."""
        self._progress(done, total, eta_s)
        assert done <= self._until, "a turn is a whole number of looks"
        if done == self._until:
            self._turns.end(self._turns.num_steps * self._batch_size, self._loss)
            self._until += self._turns.begin()


def make_context(root: Path, args: TrainArgs) -> Context:
    """Make the runner's own context; what it sends goes to the null device, which costs what a pipe does."""
    (root / "scratch").mkdir(exist_ok=True)
    _, given = read_task(root)
    task = Task.model_validate(
        {
            "job": "job_bench",
            "epoch": 1,
            "attempt": 1,
            "args": args,
            "inputs": {NAME: given},
            "resume": [],
            "store_url": str(root / "store"),
            "scratch": root / "scratch",
            "device": "cpu",
            "threads": 1,
        }
    )
    return Context(task, Channel(os.open(os.devnull, os.O_WRONLY)))


def main(root: Path) -> None:
    """Train until somebody ends this process."""
    recipe, _ = read_task(root)
    args = TrainArgs(recipe=recipe)
    context = make_context(root, args)
    stops = Stops(context, recipe)
    context.progress = stops.progress
    context.metric = stops.metric
    train.run(args, context)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
