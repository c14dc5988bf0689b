from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from service.contract.errors import Cancelled, Interrupted, Permanent, Transient
from service.contract.jobs import TrainArgs, TrainResult
from service.contract.recipe import Recipe
from worker.jobs import train

ROOT = Path(__file__).resolve().parents[3]
MakeRecipe = Callable[..., Recipe]
BUDGET = {"steps": 12, "batch_size": 16, "checkpoint_s": 0, "keep_checkpoints": 50, "log_every": 5}
TWO = {"devices": 2, "loaders": 0}


def weights(bench: Any, result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(bench.store.local(result.artifact) / "model.safetensors")


def other_ranks() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [one for one in found if one.status() != psutil.STATUS_ZOMBIE and "worker.runner" in one.cmdline()]


@pytest.fixture
def varied(recipe: MakeRecipe) -> Recipe:
    """Twelve steps with dropout and augmentation, in micro-batches, on two processes."""
    document = recipe(budget=BUDGET, bank={"size": 32}, compute=TWO | {"micro_batch": 3}).model_dump(mode="json")
    for tower in document["towers"].values():
        tower |= {"dropout": 0.1, "augment": {"kind": "tokens", "drop": 0.2}}
    return Recipe.model_validate(document)


def test_two_processes_learn_what_one_learns(recipe: MakeRecipe, bench: Any) -> None:
    made = recipe(budget=BUDGET, bank={"size": 32})
    one = train.run(TrainArgs(recipe=made), bench.context("job_one"))
    two = train.run(
        TrainArgs(recipe=made.model_copy(update={"compute": recipe(compute=TWO).compute})), bench.context("job_two")
    )
    alone, shared = weights(bench, one), weights(bench, two)
    for name, value in alone.items():
        if "qkv.bias" not in name:  # a key's bias has no gradient but rounding, which Adam blows up
            torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-4, msg=name)
    told = [bench.said(job, "metric") for job in ("job_one", "job_two")]
    assert [one["step"] for one in told[0]] == [one["step"] for one in told[1]] == [5, 10, 12, 12]
    for key in ("loss/imu+text", "grad_norm"):
        assert told[1][0]["values"][key] == pytest.approx(told[0][0]["values"][key], rel=1e-3)
    assert other_ranks() == []


def test_a_run_on_two_processes_resumes_bit_for_bit(varied: Recipe, bench: Any) -> None:
    whole = weights(bench, train.run(TrainArgs(recipe=varied), bench.context("job_r")))
    for later in range(8, 12):
        bench.store.delete(f"checkpoints/job_r/{later}-1")
    context = bench.context("job_r", epoch=2, resume=["checkpoints/job_r/7-1"])
    resumed = weights(bench, train.run(TrainArgs(recipe=varied), context))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize(("what", "error"), [("cancel", Cancelled), ("interrupt", Interrupted)])
def test_whoever_leads_stops_for_all(
    what: Any, error: type[Exception], varied: Recipe, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = varied.model_copy(update={"budget": varied.budget and varied.budget.model_copy(update={"steps": 10**6})})
    context = bench.context("job_c")
    threading.Timer(6.0, context.ask, [what]).start()
    with pytest.raises(error):
        train.run(TrainArgs(recipe=patient), context)
    assert other_ranks() == []
    assert bench.store.list("models") == []


def when_training(bench: Any, job: str, act: Callable[[], None]) -> threading.Thread:
    """Do something once the first checkpoint is there."""

    def wait() -> None:
        give_up_at = time.monotonic() + 60
        while not bench.store.list(f"checkpoints/{job}") and time.monotonic() < give_up_at:
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_rank_that_is_killed_fails_the_attempt_at_once_and_may_be_tried_again(varied: Recipe, bench: Any) -> None:
    patient = varied.model_copy(update={"budget": varied.budget and varied.budget.model_copy(update={"steps": 10**6})})
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        other_ranks()[0].send_signal(signal.SIGKILL)

    thread = when_training(bench, "job_k", kill)
    with pytest.raises(Transient, match="rank 1 of 2 was killed by SIGKILL") as failure:
        train.run(TrainArgs(recipe=patient), bench.context("job_k"))
    assert failure.value.code == "rank_died"
    assert time.monotonic() - killed[0] < 10
    thread.join()
    assert other_ranks() == []


def test_what_one_rank_cannot_read_fails_the_job_with_its_own_words(recipe: MakeRecipe, bench: Any) -> None:
    """Every batch is all of the data, and the bad sample is in rank 1's half of the first."""
    from worker.learning.data import open_dataset

    rows = [(f"s{at}", {"codes": b"no array", "text": b"a"}, "", False) for at in range(1)]
    good = open_dataset("ds_codes", bench.context("job_data")).samples
    rows += [(f"s{at}", {"codes": good.payload("codes", at), "text": b"a"}, "", False) for at in range(1, 16)]
    bench.publish("ds_bad", {"codes": "discrete", "text": "text"}, rows)
    document = recipe(budget=BUDGET, compute=TWO).model_dump(mode="json")
    document["towers"].pop("imu")
    document["pairs"] = [{"dataset": "ds_bad", "modalities": ["codes", "text"]}]
    document["seed"] = next(seed for seed in range(20) if 0 in np.random.default_rng([seed, 0, 0]).permutation(16)[8:])
    with pytest.raises(Permanent, match="sample 's0' of data set ds_bad, codes: an array is npy"):
        train.run(TrainArgs(recipe=Recipe.model_validate(document)), bench.context("job_b"))
    assert other_ranks() == []


LEADER = """
import json, sys
from service.contract.jobs import TrainArgs
from worker.jobs import train
from worker.runner import Channel, Context
from worker.task import Task
task = Task.model_validate_json(sys.stdin.read())
train.run(task.args, Context(task, Channel(1)))
"""


def test_whoever_leads_takes_ranks_and_loaders_with_it_when_it_is_killed(varied: Recipe, bench: Any) -> None:
    document = varied.model_dump(mode="json")
    document["budget"]["steps"] = 10**6
    document["compute"]["loaders"] = 1
    args = TrainArgs(recipe=Recipe.model_validate(document))
    task = bench.context("job_l").task.model_copy(update={"args": args})
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert leader.stdin is not None
    leader.stdin.write(task.model_dump_json().encode())
    leader.stdin.close()
    give_up_at = time.monotonic() + 100
    while not bench.store.list("checkpoints/job_l"):
        assert leader.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.1)
    family = psutil.Process(leader.pid).children(recursive=True)
    commands = [" ".join(one.cmdline()) for one in family]
    assert sum("worker.runner" in command for command in commands) == 1
    assert sum("worker.loader" in command for command in commands) == 2  # one of each rank
    leader.kill()
    leader.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_more_devices_than_there_are_are_refused_with_both_numbers(
    varied: Recipe, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Permanent, match=r"compute\.devices is 2 and this worker has 1 GPU$"):
        train.run(TrainArgs(recipe=varied), bench.context("job_d", device="cuda"))


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 16 is not a multiple of compute\.devices 3"):
        Recipe.model_validate(json.loads(_document()) | {"compute": {"devices": 3}})


def _document() -> str:
    tower = {"tokens": {"kind": "discrete", "vocab": 4, "max_length": 4}}
    pairs = [{"dataset": "ds_a", "modalities": ["a", "b"]}]
    return json.dumps({"towers": {"a": tower, "b": tower}, "pairs": pairs, "budget": {"batch_size": 16}})
