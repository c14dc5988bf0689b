"""Checkpoints under fire: killed as they are saved, cut short, flipped, pruned while read, on a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from service.contract.artifacts import open_store
from service.contract.errors import NotFound
from service.contract.jobs import TrainArgs
from service.contract.recipe import Recipe
from service.contract.tokens import text
from tests.supervisors import ROOT
from tests.worker.conftest import Bench, make_bench, make_recipe

FILES = (
    "manifest.json",
    "model/model.safetensors",
    "model/recipe.json",
    "model/tokenizers/text.json",
    "state/optimiser.safetensors",
    "state/position.json",
    "state/rng.safetensors",
)
STEPS = 12


@pytest.mark.parametrize("num_rounds", [25, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_it_saves_the_newest_whole_checkpoint_is_found_each_time(num_rounds: int, tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(Path(__file__).with_name("torn.py"))]
    command += [str(tmp_path / "store"), str(tmp_path / "scratch"), str(num_rounds), "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == num_rounds
    assert all(one["killed"] for one in rounds), done.stderr[-3000:]
    last = 0
    for one in rounds:
        # Whatever was told is there; one that was published just before the kill may not have been told.
        assert last <= one["found"] <= last + 1, rounds
        assert one["skipped"] == []
        last = max(one["found"], *one["saved"], 0)
    assert last >= num_rounds // 2
    store = open_store(str(tmp_path / "store"))
    for key in store.list("checkpoints"):
        store.verify(key)
    # The kills did tear some; what they left lies aside, where nobody reads and sweeps come.
    assert rounds[-1]["aside"] > 0
    assert store.sweep_temporary(0.0) == len(list((tmp_path / "store" / ".tmp").iterdir())) + rounds[-1]["aside"]
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []


def _recipe(**budget: Any) -> Recipe:
    changes = {"steps": STEPS, "batch_size": 16, "checkpoint_s": 0, "keep_checkpoints": 50, "log_every": 5} | budget
    document = make_recipe(budget=changes, bank={"size": 32}).model_dump(mode="json")
    for tower in document["towers"].values():
        tower["dropout"] = 0.1
    return Recipe.model_validate(document)


def _train(bench: Bench, job: str, epoch: int, recipe: Recipe) -> dict[str, torch.Tensor]:
    from worker.jobs import train

    result = train.run(TrainArgs(recipe=recipe), bench.context(job, epoch=epoch))
    return load_file(bench.store.verified(result.artifact) / "model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, and runs are equal only on as many."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A store with every checkpoint of a run, and the weights that the run ended with."""
    folder = tmp_path_factory.mktemp("finished")
    bench = make_bench(folder)
    return folder, _train(bench, "job_c", 1, _recipe())


@pytest.fixture
def stopped(finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Bench:
    """That store as it was after step 6."""
    folder = tmp_path / "stopped"
    shutil.copytree(finished[0], folder)
    inputs = make_bench(tmp_path / "inputs").inputs
    bench = Bench(folder, open_store(str(folder / "store")), inputs)
    for step in range(7, STEPS):
        bench.store.delete(f"checkpoints/job_c/{step}-1")
    return bench


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": _flip, "cut": _cut, "missing": Path.unlink}


@pytest.mark.parametrize("how", list(DAMAGES))
def test_damage_to_any_file_is_seen_and_told_and_the_older_checkpoint_is_used(how: str, stopped: Bench) -> None:
    from worker.learning import checkpoints

    newest = stopped.root / "store" / "checkpoints" / "job_c" / "6-1"
    assert tuple(sorted(str(path.relative_to(newest)) for path in newest.rglob("*.*"))) == FILES
    data = {name: {"digest": found["digest"]} for name, found in stopped.inputs.items()}
    for epoch, name in enumerate(FILES, start=2):
        before = (newest / name).read_bytes()
        DAMAGES[how](newest / name)
        start = checkpoints.find(stopped.context("job_c", epoch=epoch), _recipe(), data)
        assert start is not None
        assert start.key == "checkpoints/job_c/5-1", name
        told = stopped.said("job_c", "event", epoch=epoch)
        if (how, name) != ("missing", "manifest.json"):  # what has no manifest does not exist
            (event,) = told
            assert event["type"] == "checkpoint_skipped"
            assert event["detail"]["artifact"] == "checkpoints/job_c/6-1"
            assert name in event["detail"]["reason"]
        (newest / name).write_bytes(before)
    start = checkpoints.find(stopped.context("job_c", epoch=99), _recipe(), data)
    assert start is not None
    assert start.key == "checkpoints/job_c/6-1"


def test_from_an_older_checkpoint_it_ends_with_the_same_weights(
    stopped: Bench, finished: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    for step, name in ((6, "model/model.safetensors"), (5, "state/rng.safetensors"), (4, "state/position.json")):
        _flip(stopped.root / "store" / "checkpoints" / "job_c" / f"{step}-1" / name)
    weights = _train(stopped, "job_c", 2, _recipe())
    assert all(torch.equal(value, weights[name]) for name, value in finished[1].items())
    kinds = [event["type"] for event in stopped.said("job_c", "event", epoch=2)]
    assert kinds == ["checkpoint_skipped"] * 3 + ["resumed"]


GLOBAL_GENERATORS = """
import random, sys
import numpy as np
from worker.jobs import train
from worker.runner import Channel, Context
from worker.task import Task
task = Task.model_validate_json(sys.stdin.read())
context = Context(task, Channel(1))
random.seed(4711)
np.random.seed(4711)
before = random.getstate(), str(np.random.get_state())
artifact = train.run(task.args, context).artifact
assert before == (random.getstate(), str(np.random.get_state()))
print(artifact, file=sys.stderr)
"""


def test_nothing_draws_from_the_global_generators_of_python_and_numpy(
    stopped: Bench, finished: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    """They are in no checkpoint. Whatever state they have, it stays, and the weights are the same."""
    (stopped.root / "scratch").mkdir()
    task = {
        "job": "job_n",
        "epoch": 1,
        "attempt": 1,
        "args": TrainArgs(recipe=_recipe()).model_dump(mode="json"),
        "inputs": stopped.inputs,
        "resume": [],
        "store_url": str(stopped.root / "store"),
        "scratch": str(stopped.root / "scratch"),
        "device": "cpu",
        "threads": 1,
    }
    done = subprocess.run(
        [sys.executable, "-c", GLOBAL_GENERATORS],
        input=json.dumps(task),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_THREAD_LIMIT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = load_file(stopped.store.verified(done.stderr.split()[-1]) / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in finished[1].items())


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    """A trainer saves and prunes as fast as it can; readers look up the newest and load it."""
    from worker.learning.model import load_model

    bench = make_bench(tmp_path)
    failures: list[str] = []
    ended = threading.Event()

    def run() -> None:
        _train(bench, "job_p", 1, _recipe(steps=120, keep_checkpoints=2))
        ended.set()

    trainer = threading.Thread(target=run, daemon=True)
    trainer.start()
    num_read = 0
    while not ended.is_set() and trainer.is_alive():
        saved = bench.said("job_p", "checkpoint") if (tmp_path / "said-job_p-1").exists() else []
        if not saved:
            time.sleep(0.01)
            continue
        time.sleep(0.05)  # several steps later
        key = saved[-1]["artifact"]
        try:
            loaded = load_model(bench.store.verified(key), "cpu")
        except (OSError, NotFound) as error:
            failures.append(f"{key}: {error}")
            continue
        assert loaded.body["step"] == saved[-1]["step"]
        num_read += 1
    trainer.join()
    assert ended.is_set()
    assert failures == []
    assert num_read > 3


@contextmanager
def _small_files(num_bytes: int) -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_goes_on_while_the_disk_is_full_and_saves_again_once_there_is_room(
    stopped: Bench, finished: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.jobs import train
    from worker.learning import checkpoints

    monkeypatch.setattr(checkpoints, "RETRY_S", 0.0)
    context = stopped.context("job_c", epoch=2)
    plain, seen = context.check, 0
    limits = _small_files(8192)

    def check() -> None:
        nonlocal seen
        seen += 1
        if seen == 2:  # after step 7
            limits.__enter__()
        if seen == 4:
            limits.__exit__(None, None, None)
        plain()

    monkeypatch.setattr(context, "check", check)
    result = train.run(TrainArgs(recipe=_recipe()), context)
    saved = [one["step"] for one in stopped.said("job_c", "checkpoint", epoch=2)]
    assert saved == [6, 7, 10, 11]  # 6 is told again: nobody had
    failed = [event["detail"] for event in stopped.said("job_c", "event", epoch=2) if event["type"] != "resumed"]
    assert [detail["step"] for detail in failed] == [8, 9]
    assert all("File too large" in detail["reason"] for detail in failed)
    weights = load_file(stopped.store.verified(result.artifact) / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in finished[1].items())
    for key in stopped.store.list("checkpoints"):
        stopped.store.verify(key)
    assert list((stopped.root / "store" / ".tmp").iterdir()) == []
    assert list(context.scratch.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("scratch_on_disk", [True, False])
def test_a_disk_that_fills_up_during_a_save_keeps_the_last_good_checkpoint_and_no_half_of_one(
    scratch_on_disk: bool, small_disk: Path, tmp_path: Path
) -> None:
    """With the scratch folder on the same file system, and with it on another one."""
    from worker.learning import checkpoints

    bench = make_bench(tmp_path)
    (small_disk / "store").mkdir()
    store = open_store(str(small_disk / "store"))
    context = bench.context("job_d")
    context.store = store
    if scratch_on_disk:
        context.scratch = small_disk / "scratch"
        context.scratch.mkdir()
    recipe = _recipe(keep_checkpoints=2)
    model, optimiser = _model(recipe)
    data = {name: {"digest": found["digest"]} for name, found in bench.inputs.items()}
    files = {"text": text.train(["a zero"], recipe.towers["text"].tokens)}  # pyright: ignore[reportArgumentType]
    saved = checkpoints.Checkpoints(context, recipe, files, data, None)

    def save(step: int) -> None:
        position = checkpoints.Position(step=step, drawn=[step, 0], environment={})
        saved.save(model, optimiser, position, torch.device("cpu"), {})

    save(1)
    save(2)
    used = sum(path.stat().st_size for path in (small_disk / "store").rglob("*") if path.is_file()) // 2
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(free - used // 2))
    save(3)
    assert store.list("checkpoints") == ["checkpoints/job_d/1-1", "checkpoints/job_d/2-1"]
    (event,) = bench.said("job_d", "event")
    assert event["type"] == "checkpoint_failed"
    assert os.strerror(errno.ENOSPC) in event["detail"]["reason"]
    assert list((small_disk / "store" / ".tmp").iterdir()) == []
    assert list(context.scratch.iterdir()) == []
    found = checkpoints.find(context, recipe, data)
    assert found is not None
    assert found.position.step == 2
    ballast.write_bytes(bytes(free - used * 3 // 2))
    save(4)  # 1 is retired by it, and could be read for a while yet
    assert len(store.list("checkpoints")) == 3
    save(5)  # there is no room for four: 1 goes at once
    assert store.list("checkpoints") == [f"checkpoints/job_d/{step}-1" for step in (2, 4, 5)]


def _model(recipe: Recipe) -> tuple[Any, Any]:
    from service.contract.recipe import Optimiser
    from worker.learning import optim
    from worker.learning.model import MultiTower

    model = MultiTower(recipe, {"text": 260, "codes": 24})
    optimiser = optim.build(Optimiser(), model.named_parameters())
    for parameter in model.parameters():
        parts = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        optimiser.state[parameter] = {"step": torch.zeros(()), **parts}
    return model, optimiser
