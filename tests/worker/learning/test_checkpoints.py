from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from service.contract.errors import Conflict
from service.contract.recipe import Optimiser, Recipe
from service.contract.tokens import text
from worker.learning import checkpoints, losses, optim
from worker.learning.checkpoints import Checkpoints, Position
from worker.learning.model import MultiTower, load_model
from worker.learning.ragged import Ragged

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


class Run:
    """A model and its optimiser after one step, and what writes their checkpoints."""

    def __init__(self, bench: Any, recipe: Recipe, *, keep: int = 2, epoch: int = 1, resume: list[str]) -> None:
        files = {"text": text.train(["a zero"], recipe.towers["text"].tokens)}  # pyright: ignore[reportArgumentType]
        torch.manual_seed(0)
        self.context = bench.context("job_c", epoch=epoch, resume=resume)
        self.model = MultiTower(recipe, {"text": 260, "codes": 24})
        self.optimiser = optim.build(Optimiser(), self.model.named_parameters())
        self.saved = Checkpoints(self.context, recipe, files, {}, keep)

    def step(self) -> None:
        codes = Ragged(torch.randint(0, 24, (40,)), torch.full((8,), 5))
        words = Ragged(torch.randint(4, 260, (40,)), torch.full((8,), 5))
        z = self.model.encode("codes", codes), self.model.encode("text", words)
        self.optimiser.zero_grad()
        losses.info_nce(*z, self.model.scale("codes", "text")).backward()
        self.optimiser.step()

    def save(self, step: int) -> str:
        position = Position(step=step, drawn=[step, 0], environment=checkpoints.environment(CPU))
        self.saved.save(self.model, self.optimiser, position, CPU, {"loss": 1.0})
        return f"checkpoints/job_c/{step}-{self.context.epoch}"


def test_everything_comes_back(bench: Any, recipe: MakeRecipe) -> None:
    run = Run(bench, recipe(), resume=[])
    run.step()
    key = run.save(1)
    assert bench.said("job_c", "checkpoint") == [
        {"step": 1, "artifact": key, "digest": bench.store.manifest(key).digest, "metrics": {"loss": 1.0}}
    ]
    expected = torch.rand(3)
    run.step()

    again = Run(bench, recipe(), epoch=2, resume=[key])
    folder = checkpoints.find(again.context)
    assert folder is not None
    position = checkpoints.restore(folder, again.model, again.optimiser, CPU)
    assert position.step == 1
    assert position.drawn == [1, 0]
    assert position.environment == checkpoints.environment(CPU)
    assert torch.equal(torch.rand(3), expected)
    again.step()
    for (name, parameter), (_, other) in zip(run.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_a_checkpoint_can_be_served(bench: Any, recipe: MakeRecipe) -> None:
    run = Run(bench, recipe(), resume=[])
    loaded = load_model(bench.store.local(run.save(3)), "cpu")
    assert loaded.body["step"] == 3
    batch = Ragged(torch.arange(5), torch.tensor([5]))
    assert torch.equal(loaded.model.encode("codes", batch), run.model.eval().encode("codes", batch).detach())


def test_damaged_and_missing_ones_are_passed_over(bench: Any, recipe: MakeRecipe) -> None:
    run = Run(bench, recipe(), keep=10, resume=[])
    keys = [run.save(step) for step in (1, 2, 3)]
    with (bench.root / "store" / keys[2] / "state" / "rng.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    bench.store.delete(keys[1])
    again = Run(bench, recipe(), epoch=2, resume=keys[::-1])
    assert checkpoints.find(again.context) == bench.store.local(keys[0])
    skipped = [event["detail"]["artifact"] for event in bench.said("job_c", "event", epoch=2)]
    assert skipped == [keys[2], keys[1]]


def test_one_that_was_published_and_never_recorded_is_found(bench: Any, recipe: MakeRecipe) -> None:
    """The database was away, the run went on and removed what the queue knew, and its worker died."""
    run = Run(bench, recipe(), keep=2, resume=[])
    keys = [run.save(step) for step in (1, 2, 9, 10)]
    again = Run(bench, recipe(), epoch=2, resume=keys[:2][::-1])
    assert checkpoints.find(again.context) == bench.store.local(keys[3])


def test_without_a_checkpoint_there_is_nothing_to_find(bench: Any, recipe: MakeRecipe) -> None:
    assert checkpoints.find(Run(bench, recipe(), resume=[]).context) is None


def test_only_the_newest_few_stay_those_of_earlier_attempts_included(bench: Any, recipe: MakeRecipe) -> None:
    first = Run(bench, recipe(), keep=3, resume=[])
    old = [first.save(step) for step in (1, 2, 3)]
    second = Run(bench, recipe(), keep=3, epoch=2, resume=old[::-1])
    new = [second.save(step) for step in (4, 5)]
    assert bench.store.list("checkpoints/job_c") == sorted([old[2], *new])


def test_one_step_is_saved_once(bench: Any, recipe: MakeRecipe) -> None:
    run = Run(bench, recipe(), resume=[])
    run.save(1)
    run.save(1)
    assert len(bench.said("job_c", "checkpoint")) == 1


def test_a_stale_attempt_cannot_overwrite(bench: Any, recipe: MakeRecipe) -> None:
    """Attempts differ in their epoch, which is part of the key; within one epoch the store refuses other content."""
    run = Run(bench, recipe(), resume=[])
    key = run.save(1)
    folder = bench.root / "other"
    folder.mkdir()
    (folder / "x").write_text("y")
    with pytest.raises(Conflict):
        bench.store.publish(folder, key, kind="checkpoint", id="job_c", body={})
