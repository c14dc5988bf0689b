"""Training survives: real supervisors, runners and signals; what comes out is what an undisturbed run leaves."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import sqlalchemy as sa
import torch
from safetensors.torch import load_file

from service.contract import queue
from service.contract.artifacts import Store, open_store
from service.contract.dialects import now
from service.contract.jobs import TrainArgs
from service.contract.recipe import Recipe
from service.contract.tables import checkpoint, dataset, job, job_event, metric, model
from tests.supervisors import ROOT, World, children, runner_of
from tests.worker.conftest import make_bench, make_recipe, npy
from worker.child import Child
from worker.cpus import num_cpus
from worker.task import Task

SQLITE_ONLY = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
STEPS = 60
# On busy cores the threads of OpenMP wait for each other in loops. The number that torch is told stays what it is.
QUIET = {"OMP_THREAD_LIMIT": "1"}


def _recipe(steps: int = STEPS, **budget: Any) -> Recipe:
    """Write a recipe with dropout, so that generators matter, a checkpoint after each step, and odd metrics."""
    recipe = make_recipe(
        budget={"steps": steps, "batch_size": 16, "checkpoint_s": 0, "log_every": 7} | budget, bank={"size": 32}
    )
    document = recipe.model_dump(mode="json")
    for tower in document["towers"].values():
        tower["dropout"] = 0.1
    return Recipe.model_validate(document)


@dataclass(frozen=True)
class Run:
    """What a run left: its weights, and its losses by step and pair."""

    weights: dict[str, torch.Tensor]
    losses: dict[tuple[int, str], float]

    def equals(self, other: Run) -> bool:
        """Tell whether two runs are equal, bit for bit."""
        assert self.losses == other.losses
        assert self.weights.keys() == other.weights.keys()
        return all(torch.equal(value, other.weights[name]) for name, value in self.weights.items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nobody disturbs, in a runner of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    bench = make_bench(folder)
    (folder / "scratch").mkdir()
    task = Task.model_validate(
        {
            "job": "job_u",
            "epoch": 1,
            "attempt": 1,
            "args": TrainArgs(recipe=_recipe()).model_dump(mode="json"),
            "inputs": bench.inputs,
            "resume": [],
            "store_url": str(folder / "store"),
            "scratch": folder / "scratch",
            "device": "cpu",
            "threads": num_cpus(),
        }
    )
    child = Child(preload=False, environment={**os.environ, **QUIET, "PYTHONPATH": str(ROOT)})
    child.send(task.model_dump(mode="json"))
    said: list[dict[str, Any]] = []
    while not child.ended:
        said += child.messages()
        time.sleep(0.01)
    child.close()
    assert "done" in said[-1], said[-1]
    losses = {
        (one["metric"]["step"], name): value
        for one in said
        if "metric" in one
        for name, value in one["metric"]["values"].items()
        if name.startswith("loss/")
    }
    return Run(_weights(bench.store, said[-1]["done"]["artifact"]), losses)


def _weights(store: Store, artifact: str) -> dict[str, torch.Tensor]:
    return load_file(store.verified(artifact) / "model.safetensors")


class Training:
    """Train jobs on a world's workers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = open_store(str(world.data / "store"))
        world.environment |= {"ISTHMUS_LANES": "train"} | QUIET
        for found in make_bench(world.data).inputs.values():
            self.add_dataset(found)

    def add_dataset(self, found: Any) -> None:
        """Make a published data set known to the queue."""
        row = {"id": found["id"], "tenant_id": "t", "name": found["id"], "source": "made", "state": "ready"}
        with self.world.engine.begin() as conn:
            conn.execute(sa.insert(dataset).values(**row, artifact=found["artifact"], digest=found["digest"]))

    def submit(self, recipe: Recipe | None = None) -> str:
        """Enqueue a train job."""
        with self.world.engine.begin() as conn:
            return queue.enqueue(conn, tenant="t", args=TrainArgs(recipe=recipe or _recipe()))

    def hurry(self, public_id: str) -> None:
        """Wait for no back-off."""
        with self.world.engine.begin() as conn:
            scheduled = (job.c.public_id == public_id, job.c.state == "scheduled")
            conn.execute(sa.update(job).where(*scheduled).values(run_at=now()))

    def steps(self, public_id: str) -> list[int]:
        """List the steps of the checkpoints that lie in the store."""
        keys = self.store.list(f"checkpoints/{public_id}")
        return sorted(int(key.rpartition("/")[2].partition("-")[0]) for key in keys)

    def until_step(self, public_id: str, step: int) -> int:
        """Wait for a checkpoint of that step or a later one."""
        give_up_at = time.monotonic() + 60
        hurried_at = 0.0
        while not (found := self.steps(public_id)) or found[-1] < step:
            assert time.monotonic() < give_up_at, self.world.log(len(self.world.workers) - 1)
            if time.monotonic() - hurried_at > 0.2:
                hurried_at = time.monotonic()
                self.hurry(public_id)
            time.sleep(0.002)
        return found[-1]

    def until_ended(self, public_id: str) -> Any:
        """Wait until the job has ended."""

        def ended() -> Any:
            self.hurry(public_id)
            row = self.world.row(public_id)
            return row if row.finished_at is not None else None

        return self.world.until(ended, 60)

    def events(self, public_id: str) -> list[tuple[str, Any]]:
        """Return the job's history."""
        row = self.world.row(public_id)
        with self.world.engine.connect() as conn:
            query = sa.select(job_event).where(job_event.c.job_id == row.id).order_by(job_event.c.id)
            return [(event.type, event.detail) for event in conn.execute(query)]

    def result(self, public_id: str) -> Run:
        """Return what the job left; readers keep the highest epoch of a step."""
        row = self.world.row(public_id)
        assert row.state == "succeeded", row.error
        with self.world.engine.connect() as conn:
            artifact = conn.execute(sa.select(model.c.artifact).where(model.c.job_id == public_id)).scalar_one()
            query = sa.select(metric).where(metric.c.job_id == row.id).order_by(metric.c.epoch)
            losses = {(x.step, x.name): x.value for x in conn.execute(query) if x.name.startswith("loss/")}
        return Run(_weights(self.store, artifact), losses)


@pytest.fixture
def training(world: World) -> Training:
    """Data sets, and workers that train on them."""
    return Training(world)


def _stop_all(process: subprocess.Popen[bytes]) -> None:
    """Stop a worker as a service manager does: every process of the group hears it."""
    runner = runner_of(process)
    runner.terminate()
    process.terminate()
    assert process.wait(30) == 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    assert process.wait(30) == 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _kill_runner(process: subprocess.Popen[bytes]) -> None:
    runner_of(process).kill()


DISTURBANCES = {"runner killed": _kill_runner, "killed": _kill, "stopped": _stop, "all stopped": _stop_all}


def _train_disturbed(training: Training, plan: list[tuple[int, str]]) -> str:
    """Train while a worker is disturbed once a checkpoint of each step is there; return the job."""
    public_id = training.submit()
    with training.world.engine.begin() as conn:
        conn.execute(sa.update(job).where(job.c.public_id == public_id).values(max_attempts=len(plan) + 1))
    with ExitStack() as workers:
        process = workers.enter_context(training.world.worker())
        for step, how in plan:
            training.until_step(public_id, step)
            DISTURBANCES[how](process)
            if process.poll() is not None:
                process = workers.enter_context(training.world.worker())
        training.until_ended(public_id)
        _stop(process)
    return public_id


def test_killed_and_stopped_it_ends_with_the_weights_and_losses_of_an_undisturbed_run(
    training: Training, undisturbed: Run, check_invariants: Any
) -> None:
    plan = [(7, "runner killed"), (15, "stopped"), (25, "killed"), (36, "all stopped")]
    public_id = _train_disturbed(training, plan)
    check_invariants(training.world.engine, [public_id])
    assert training.result(public_id).equals(undisturbed)
    row = training.world.row(public_id)
    assert (row.attempt, row.lease_epoch) == (3, 5)  # only the kills count
    events = training.events(public_id)
    told = [kind for kind, _ in events if kind != "queued"]
    assert told == [
        *("started", "retrying"),
        *("started", "resumed", "released"),
        *("started", "resumed", "retrying"),
        *("started", "resumed", "released"),
        *("started", "resumed", "succeeded"),
    ]
    resumed = [detail for kind, detail in events if kind == "resumed"]
    assert all(detail["same_environment"] for detail in resumed)
    for (step, how), detail in zip(plan, resumed, strict=True):
        assert detail["step"] >= step, how
    # What is listed is whole; nothing of those who died lies about.
    listed = [one.artifact for one in training.world.rows(checkpoint)]
    assert len(listed) == 2
    for artifact in listed:
        training.store.verify(artifact)
    assert list((training.world.data / "scratch").iterdir()) == []


@pytest.mark.slow
@SQLITE_ONLY
def test_killed_at_every_fourth_step_it_ends_with_the_weights_and_losses_of_an_undisturbed_run(
    training: Training, undisturbed: Run, check_invariants: Any
) -> None:
    rng = random.Random(5)
    plan = [(step, rng.choice(sorted(DISTURBANCES))) for step in range(2, STEPS - 4, 4)]
    public_id = _train_disturbed(training, plan)
    check_invariants(training.world.engine, [public_id])
    assert training.result(public_id).equals(undisturbed)
    num_kills = sum("killed" in how for _, how in plan)
    assert training.world.row(public_id).attempt == num_kills + 1


@SQLITE_ONLY
def test_a_cancelled_or_failed_job_that_is_retried_goes_on_from_its_last_checkpoint(
    training: Training, undisturbed: Run
) -> None:
    world = training.world
    public_id = training.submit()
    with world.worker() as process:
        training.until_step(public_id, 10)
        with world.engine.begin() as conn:
            queue.cancel(conn, "t", public_id)
        assert training.until_ended(public_id).state == "cancelled"
        (first,) = [detail["step"] for kind, detail in _retried(training, public_id) if kind == "resumed"]
        assert first >= 10
        with world.engine.begin() as conn:
            conn.execute(sa.update(job).where(job.c.public_id == public_id).values(max_attempts=1))
        training.until_step(public_id, first + 10)
        _kill_runner(process)
        row = training.until_ended(public_id)
        assert (row.state, row.error["code"]) == ("failed", "runner_died")
        *_, second = [detail["step"] for kind, detail in _retried(training, public_id) if kind == "resumed"]
        assert second >= first + 10
        training.until_ended(public_id)
    assert training.result(public_id).equals(undisturbed)


def _retried(training: Training, public_id: str) -> list[tuple[str, Any]]:
    """Retry a job, and return its history once it has resumed once more."""
    before = [kind for kind, _ in training.events(public_id)].count("resumed")
    with training.world.engine.begin() as conn:
        queue.retry(conn, "t", public_id)

    def resumed() -> Any:
        events = training.events(public_id)
        return events if [kind for kind, _ in events].count("resumed") > before else None

    return training.world.until(resumed, 60)


@SQLITE_ONLY
def test_a_runner_that_is_told_to_stop_writes_a_checkpoint_and_burns_no_attempt(training: Training) -> None:
    """No checkpoint is due: without this one the next attempt would start from nothing."""
    world = training.world
    public_id = training.submit(_recipe(100_000, checkpoint_s=3600))
    with world.worker() as process:
        world.until(lambda: world.rows(metric), 60)
        assert training.steps(public_id) == []
        runner_of(process).terminate()
        world.until(lambda: "resumed" in dict(training.events(public_id)), 60)
        (saved,) = training.steps(public_id)
        assert saved >= 7
        assert [(kind, detail.get("step")) for kind, detail in training.events(public_id) if kind != "queued"] == [
            ("started", None),
            ("released", None),
            ("started", None),
            ("resumed", saved),
        ]
        assert (world.row(public_id).attempt, world.row(public_id).lease_epoch) == (1, 2)
        with world.engine.begin() as conn:
            queue.cancel(conn, "t", public_id)
        assert training.until_ended(public_id).state == "cancelled"


@SQLITE_ONLY
def test_a_full_disk_costs_no_checkpoint_that_is_there_and_the_job_is_done_once_there_is_room(
    training: Training, undisturbed: Run
) -> None:
    world = training.world
    public_id = training.submit()
    with world.worker() as process:
        training.until_step(public_id, 20)
        runner = runner_of(process)
        # No file can grow beyond this: to the process, a disk that is full.
        resource.prlimit(runner.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        world.until(lambda: "retrying" in dict(training.events(public_id)), 60)
        last = training.steps(public_id)[-1]
        assert 20 <= last < STEPS - 1
        training.store.verify(f"checkpoints/{public_id}/{last}-1")
        told = dict(training.events(public_id))
        assert told["retrying"]["error"]["code"] == "no_space"
        assert "File too large" in told["checkpoint_failed"]["reason"]
        world.until(lambda: not runner.is_running())
        training.until_ended(public_id)
    resumed = [detail["step"] for kind, detail in training.events(public_id) if kind == "resumed"]
    assert resumed == [last]
    assert training.result(public_id).equals(undisturbed)


@SQLITE_ONLY
def test_a_damaged_checkpoint_is_passed_over_and_no_longer_offered(training: Training, undisturbed: Run) -> None:
    world = training.world
    public_id = training.submit()
    with world.worker() as process:
        training.until_step(public_id, 20)
        _stop(process)
    newest, older = [row.artifact for row in sorted(world.rows(checkpoint), key=lambda row: -row.step)]
    path = world.data / "store" / newest / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with world.worker():
        training.until_ended(public_id)
    events = training.events(public_id)
    (skipped,) = [detail for kind, detail in events if kind == "checkpoint_skipped"]
    assert skipped["artifact"] == newest
    assert "does not match its digest" in skipped["reason"]
    (resumed,) = [detail for kind, detail in events if kind == "resumed"]
    assert resumed["artifact"] == older
    assert newest not in {row.artifact for row in world.rows(checkpoint)}
    assert training.result(public_id).equals(undisturbed)


@SQLITE_ONLY
def test_a_step_that_needs_more_memory_than_there_is_is_tried_again_later(training: Training) -> None:
    """A real refusal of the real allocator: the runner may not grow as far as this batch needs."""
    world = training.world
    bench = make_bench(world.data / "more")
    ids = np.arange(4000, dtype=np.int32) % 24
    rows = [(f"s{at}", {"codes": npy(ids), "text": b"a word"}, "", False) for at in range(80)]
    found = bench.publish("ds_long", {"codes": "discrete", "text": "text"}, rows)
    (world.data / "more" / "store" / "datasets" / "ds_long").rename(world.data / "store" / "datasets" / "ds_long")
    training.add_dataset(found)
    document = _recipe(batch_size=80).model_dump(mode="json")
    document["towers"].pop("imu")
    document["towers"]["codes"]["tokens"]["max_length"] = 4096
    document["pairs"] = [{"dataset": "ds_long", "modalities": ["codes", "text"]}]
    with world.worker(ISTHMUS_PRELOAD="true") as process:
        (idle,) = world.until(lambda: children(process, "--preload"), 60)
        world.until(lambda: _has_torch(idle), 60)
        time.sleep(0.5)
        resource.prlimit(idle.pid, resource.RLIMIT_AS, (idle.memory_info().vms + (300 << 20), resource.RLIM_INFINITY))
        public_id = training.submit(Recipe.model_validate(document))
        world.until(lambda: "retrying" in dict(training.events(public_id)), 60)
        with world.engine.begin() as conn:
            queue.cancel(conn, "t", public_id)
        error = dict(training.events(public_id))["retrying"]["error"]
        assert error["code"] == "out_of_memory"
        assert "batch_size 80" in error["message"]
        world.until(lambda: not idle.is_running())
        other = training.submit(_recipe(5))
        assert training.until_ended(other).state == "succeeded"


def _has_torch(process: psutil.Process) -> bool:
    return any("libtorch" in mapped.path for mapped in process.memory_maps())


@pytest.fixture
def service(database_url: str, tmp_path: Path, training: Training) -> Iterator[httpx.Client]:
    """The API and a worker, as `isthmus serve` starts them, on the training's data."""
    environment = training.world.environment | {"ISTHMUS_LANES": "train,serve", "ISTHMUS_TICK_S": "0.2"}
    command = [sys.executable, "-m", "service.cli", "serve", "--data", str(training.world.data), "--port", "0"]
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            ready = next((line for line in process.stdout if "is ready at " in line), None)
            assert ready is not None, (tmp_path / "serve.log").read_text()[-4000:]
            with httpx.Client(base_url=ready.split("is ready at ")[1].split()[0], timeout=60, trust_env=False) as http:
                yield http
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            process.stdout.close()


@SQLITE_ONLY
def test_checkpoints_are_listed_and_served_while_the_job_trains(service: httpx.Client, training: Training) -> None:
    world = training.world
    with world.engine.begin() as conn:  # the tenant of an open loopback
        conn.execute(sa.update(dataset).values(tenant_id="default"))
    body = {
        "kind": "train",
        "recipe": _recipe(1_000_000, log_every=100, checkpoint_s=0.3, keep_checkpoints=4).model_dump(mode="json"),
    }
    public_id = service.post("/v1/jobs", json=body).raise_for_status().json()["id"]
    training.until_step(public_id, 1)
    world.until(lambda: service.get(f"/v1/jobs/{public_id}/checkpoints").raise_for_status().json()["data"], 30)
    vectors: list[Any] = []
    steps: list[int] = []
    until = time.monotonic() + 6
    while time.monotonic() < until:
        listed = service.get(f"/v1/jobs/{public_id}/checkpoints").raise_for_status().json()["data"]
        assert [one["step"] for one in listed] == sorted((one["step"] for one in listed), reverse=True)
        steps.append(listed[0]["step"])
        for name in (f"{public_id}@latest", listed[0]["id"], listed[-1]["id"]):
            answer = service.post("/v1/embeddings", json={"model": name, "input": ["a three"]})
            if answer.status_code == 404 and name == listed[-1]["id"]:  # pruned between the two requests
                again = service.get(f"/v1/jobs/{public_id}/checkpoints").raise_for_status().json()["data"]
                assert name not in {one["id"] for one in again}
                continue
            assert answer.status_code == 200, (name, answer.text)
            vectors.append(answer.json()["data"][0]["embedding"])
        described = service.get(f"/v1/models/{public_id}@latest").raise_for_status().json()
        assert (described["state"], described["job_id"]) == ("checkpoint", public_id)
    assert service.get(f"/v1/jobs/{public_id}").json()["status"] == "running"
    assert steps[-1] > steps[0]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert len({tuple(vector) for vector in vectors}) > 2  # it learns meanwhile
    gone = service.post("/v1/embeddings", json={"model": f"{public_id}@0", "input": ["a three"]})
    assert gone.status_code == 404
    service.post(f"/v1/jobs/{public_id}/cancel").raise_for_status()
    world.until(lambda: service.get(f"/v1/jobs/{public_id}").json()["status"] == "cancelled", 30)


GPU_SCRIPT = """
import json, sys
from service.contract.jobs import TrainArgs
from worker.jobs import train
from worker.runner import Channel, Context
from worker.task import Task
task = Task.model_validate_json(sys.stdin.read())
print(train.run(task.args, Context(task, Channel(1))).artifact, file=sys.stderr)
"""


@pytest.mark.gpu
def test_on_a_gpu_with_deterministic_algorithms_a_resumed_run_has_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    task: dict[str, Any] = {
        "job": "job_g",
        "attempt": 1,
        "args": TrainArgs(recipe=_recipe(40, keep_checkpoints=100)).model_dump(mode="json"),
        "inputs": bench.inputs,
        "resume": [],
        "store_url": str(tmp_path / "store"),
        "device": "cuda",
        "threads": 1,
    }
    runs: list[dict[str, torch.Tensor]] = []
    for epoch in (1, 2):
        scratch = tmp_path / f"scratch-{epoch}"
        scratch.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", GPU_SCRIPT],
            input=json.dumps(task | {"epoch": epoch, "scratch": str(scratch)}),
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert ('"resumed"' in done.stdout) == (epoch == 2)
        runs.append(_weights(bench.store, done.stderr.split()[-1]))
        for step in range(18, 40):
            bench.store.delete(f"checkpoints/job_g/{step}-1")
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
