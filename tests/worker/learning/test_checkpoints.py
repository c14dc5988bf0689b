from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service.contract.errors import Conflict
from service.contract.losses import InfoNCE
from service.contract.recipe import Budget, Optimiser, Recipe
from service.contract.tokens import text
from worker.learning import checkpoints, losses, optim
from worker.learning.checkpoints import Checkpoints, Position
from worker.learning.model import MultiTower, load_model
from worker.learning.ragged import Ragged

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
DATA = {"ds_codes": {"digest": "0" * 64}}


class Run:
    """A model and its optimiser after one step, and what writes their checkpoints."""

    def __init__(
        self, bench: Any, recipe: Recipe, *, keep: int = 2, epoch: int = 1, resume: list[str], grace_s: float = 0.0
    ) -> None:
        files = {"text": text.train(["a zero"], recipe.towers["text"].tokens)}  # pyright: ignore[reportArgumentType]
        torch.manual_seed(0)
        self.context = bench.context("job_c", epoch=epoch, resume=resume)
        self.recipe = recipe.model_copy(update={"budget": Budget(keep_checkpoints=keep, checkpoint_s=0)})
        self.model = MultiTower(recipe, {"text": 260, "codes": 24})
        self.optimiser = optim.build(Optimiser(), self.model.named_parameters())
        self.start = checkpoints.find(self.context, self.recipe, DATA)
        self.saved = Checkpoints(self.context, self.recipe, files, DATA, self.start, grace_s=grace_s)

    def step(self) -> None:
        codes = Ragged(torch.randint(0, 24, (40,)), torch.full((8,), 5))
        words = Ragged(torch.randint(4, 260, (40,)), torch.full((8,), 5))
        z = self.model.encode("codes", codes), self.model.encode("text", words)
        self.optimiser.zero_grad()
        losses.compute(InfoNCE(), *z, self.model.scale("codes", "text")).backward()
        self.optimiser.step()

    def save(self, step: int) -> str:
        position = Position(step=step, drawn=[step, 0], environment=checkpoints.environment(CPU))
        self.saved.save(self.model, self.optimiser, position, CPU, {"loss": 1.0})
        return f"checkpoints/job_c/{step}-{self.context.epoch}"


def _flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))


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
    assert again.start is not None
    assert (again.start.key, again.start.metrics) == (key, {"loss": 1.0})
    checkpoints.restore(again.start, again.model, again.optimiser, CPU)
    assert again.start.position == Position(step=1, drawn=[1, 0], environment=checkpoints.environment(CPU))
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
    _flip(bench.root / "store" / keys[2] / "state" / "rng.safetensors")
    bench.store.delete(keys[1])
    again = Run(bench, recipe(), keep=10, epoch=2, resume=keys[::-1])
    assert again.start is not None
    assert again.start.key == keys[0]
    skipped = [event["detail"]["artifact"] for event in bench.said("job_c", "event", epoch=2)]
    assert skipped == [keys[2], keys[1]]
    assert [saved["artifact"] for saved in bench.said("job_c", "checkpoint", epoch=2)] == [keys[0]]


def test_what_was_passed_over_is_not_among_those_that_are_kept(bench: Any, recipe: MakeRecipe) -> None:
    run = Run(bench, recipe(), keep=2, resume=[], grace_s=60)
    keys = [run.save(step) for step in (7, 8, 9)]
    _flip(bench.root / "store" / keys[2] / "model" / "model.safetensors")
    again = Run(bench, recipe(), keep=2, epoch=2, resume=keys[:0:-1])
    assert again.saved._kept == [keys[1], keys[0]]
    whole = again.save(9)
    assert again.saved._kept == [whole, keys[1]]


def test_one_that_was_published_and_never_recorded_is_found_and_told(bench: Any, recipe: MakeRecipe) -> None:
    """The database was away, the run went on, and its worker died."""
    run = Run(bench, recipe(), keep=4, resume=[])
    keys = [run.save(step) for step in (1, 2, 9, 10)]
    again = Run(bench, recipe(), keep=4, epoch=2, resume=keys[:2][::-1])
    assert again.start is not None
    assert again.start.key == keys[3]
    assert [saved["step"] for saved in bench.said("job_c", "checkpoint", epoch=2)] == [10]


def test_without_a_checkpoint_there_is_nothing_to_find(bench: Any, recipe: MakeRecipe) -> None:
    assert Run(bench, recipe(), resume=[]).start is None


def test_a_checkpoint_of_another_recipe_is_refused_and_that_is_told(bench: Any, recipe: MakeRecipe) -> None:
    key = Run(bench, recipe(), resume=[]).save(5)
    other = Run(bench, recipe(seed=4), epoch=2, resume=[key])
    assert other.start is None
    detail = {"artifact": key, "reason": "its recipe is another"}
    assert bench.said("job_c", "event", epoch=2) == [{"type": "checkpoint_skipped", "detail": detail}]


def test_a_checkpoint_of_other_data_is_refused_and_that_is_told(
    bench: Any, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Run(bench, recipe(), resume=[]).save(5)
    monkeypatch.setitem(DATA, "ds_codes", {"digest": "f" * 64})
    assert Run(bench, recipe(), epoch=2, resume=[key]).start is None
    detail = {"artifact": key, "reason": "data set ds_codes has changed since"}
    assert bench.said("job_c", "event", epoch=2) == [{"type": "checkpoint_skipped", "detail": detail}]


def test_only_the_newest_few_stay_those_of_earlier_attempts_included(bench: Any, recipe: MakeRecipe) -> None:
    first = Run(bench, recipe(), keep=3, resume=[])
    old = [first.save(step) for step in (1, 2, 3)]
    second = Run(bench, recipe(), keep=3, epoch=2, resume=old[::-1])
    new = [second.save(step) for step in (4, 5, 6)]
    assert bench.store.list("checkpoints/job_c") == sorted([old[2], *new])  # the last to retire goes with the next save


def test_of_two_attempts_at_one_step_the_last_counts_and_both_are_whole(bench: Any, recipe: MakeRecipe) -> None:
    first = Run(bench, recipe(), keep=2, resume=[])
    keys = [first.save(step) for step in (4, 5)]
    bench.store.delete(keys[1])
    second = Run(bench, recipe(), keep=2, epoch=2, resume=[keys[0]])
    first.save(6)  # a trainer that does not know yet that it was declared dead
    keys += [second.save(5), second.save(6)]
    for key in (keys[2], keys[3], "checkpoints/job_c/6-1"):
        bench.store.verify(key)
    third = Run(bench, recipe(), keep=2, epoch=3, resume=[keys[3], keys[2]])
    assert third.start is not None
    assert third.start.key == keys[3]
    assert third.saved._kept == [keys[3], keys[2]]


def test_a_checkpoint_that_is_pruned_can_be_read_for_a_while_yet(bench: Any, recipe: MakeRecipe) -> None:
    run = Run(bench, recipe(), keep=2, resume=[], grace_s=0.4)
    keys = [run.save(step) for step in (1, 2, 3, 4)]
    assert bench.store.list("checkpoints/job_c") == keys
    time.sleep(0.4)
    keys.append(run.save(5))
    assert bench.store.list("checkpoints/job_c") == keys[2:]  # 3 was retired by 5, just now


def test_one_step_is_saved_once_and_the_one_that_a_run_started_from_is_not_saved_again(
    bench: Any, recipe: MakeRecipe
) -> None:
    run = Run(bench, recipe(), resume=[])
    key = run.save(1)
    run.save(1)
    assert len(bench.said("job_c", "checkpoint")) == 1
    again = Run(bench, recipe(), epoch=2, resume=[key])
    again.save(1)
    assert bench.said("job_c", "checkpoint", epoch=2) == []


def test_a_stale_attempt_cannot_overwrite(bench: Any, recipe: MakeRecipe) -> None:
    """Attempts differ in their epoch, which is part of the key; within one epoch the store refuses other content."""
    run = Run(bench, recipe(), resume=[])
    key = run.save(1)
    folder = bench.root / "other"
    folder.mkdir()
    (folder / "x").write_text("y")
    with pytest.raises(Conflict):
        bench.store.publish(folder, key, kind="checkpoint", id="job_c", body={})
