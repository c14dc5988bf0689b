"""Workers that are killed: at every moment between a claim and its completion."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract.artifacts import open_store
from service.contract.tables import dataset, job, job_result, worker
from tests.faults.conftest import NoopWorkers
from tests.faults.ledger import Ledger
from tests.supervisors import World, runner_of
from worker.sweeper import sweep


@pytest.mark.parametrize("num_jobs", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_no_job_is_lost_and_none_has_two_results_while_workers_are_killed_and_frozen(
    num_jobs: int,
    engine: sa.Engine,
    noop_workers: NoopWorkers,
    ledger: Ledger,
    enqueue_many: Callable[..., list[str]],
    check_invariants: Callable[..., Counter[str]],
    record_figures: Callable[..., None],
) -> None:
    rng = random.Random(num_jobs)
    options = ("--ttl-s", "1", "--heartbeat-s", "0.2", "--work-s", "0.05")
    fleet = [noop_workers.start(*options) for _ in range(3)]
    acknowledged = enqueue_many(num_jobs)
    started_at = time.monotonic()
    unfinished = sa.select(sa.func.count()).select_from(job).where(job.c.finished_at.is_(None))
    kills = freezes = 0
    while True:
        with engine.connect().execution_options(sqlite_read=True) as conn:
            if conn.execute(unfinished).scalar_one() == 0:
                break
        assert time.monotonic() - started_at < 240, "the workers do not get on"
        time.sleep(rng.uniform(0.5, 1.5))
        victim = rng.randrange(3)
        if rng.random() < 0.25:
            fleet[victim].send_signal(signal.SIGSTOP)
            time.sleep(1.6)  # longer than its lease
            fleet[victim].send_signal(signal.SIGCONT)
            freezes += 1
        else:
            fleet[victim].kill()
            fleet[victim].wait()
            fleet[victim] = noop_workers.start(*options)
            kills += 1
    seconds = time.monotonic() - started_at
    assert check_invariants(engine, acknowledged) == {"succeeded": num_jobs}
    finished = Counter(entry.job for entry in ledger.read("finish"))
    assert max(finished.values()) == 1
    record_figures(
        jobs=num_jobs,
        kills=kills,
        freezes=freezes,
        re_executions=len(ledger.read("start")) - num_jobs,
        stale_completions_refused=len(ledger.read("refused")),
        seconds=round(seconds, 1),
    )
    assert kills >= 3


def test_a_worker_killed_between_claim_and_start_costs_one_attempt(
    odd_world: World, ledger: Ledger, check_invariants: Callable[..., Counter[str]]
) -> None:
    public_id = odd_world.ingest("odd:done")
    with odd_world.worker(ISTHMUS_SABOTAGE="claimed") as process:
        assert process.wait(20) == -signal.SIGKILL
        row = odd_world.row(public_id)
        assert (row.state, row.attempt, row.lease_epoch) == ("running", 1, 1)
        with odd_world.worker():
            row = odd_world.until_state(public_id, "succeeded", "failed")
    assert (row.state, row.attempt, row.lease_epoch) == ("succeeded", 2, 2)
    assert [entry.attempt for entry in ledger.read("start")] == [2]  # the first attempt never reached a runner
    check_invariants(odd_world.engine, [public_id])


def test_a_worker_killed_before_its_completion_leaves_an_artifact_that_is_swept(
    odd_world: World, ledger: Ledger, check_invariants: Callable[..., Counter[str]]
) -> None:
    store = open_store(str(odd_world.data / "store"))
    lines = "".join(json.dumps({"caption": f"caption {index}"}) + "\n" for index in range(40))
    key, _, _ = store.write_upload("captions.jsonl", [lines.encode()])
    public_id = odd_world.ingest(f"store:{key}")
    (made,) = odd_world.rows(dataset)
    first, second = (f"datasets/{made.id}/{epoch}" for epoch in (1, 2))
    with odd_world.worker(ISTHMUS_SABOTAGE="published") as process:
        assert process.wait(30) == -signal.SIGKILL
        assert store.exists(first)
        assert odd_world.rows(job_result) == []
        with odd_world.worker():
            odd_world.until_state(public_id, "succeeded", "failed")
    assert check_invariants(odd_world.engine, [public_id]) == {"succeeded": 1}
    assert [entry.epoch for entry in ledger.read("finish")] == [1, 2]
    (result,) = odd_world.rows(job_result)
    (made,) = odd_world.rows(dataset)
    assert result.body["artifact"] == made.artifact == second
    assert first in sweep(odd_world.engine, store, older_than_s=-1)
    assert not store.exists(first)
    store.verify(second)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_within_half_a_minute_with_the_lease_times_of_the_settings(
    odd_world: World,
    ledger: Ledger,
    tmp_path: Path,
    check_invariants: Callable[..., Counter[str]],
    record_figures: Callable[..., None],
) -> None:
    for name in ("TICK_S", "HEARTBEAT_S", "WORKER_TTL_S"):
        del odd_world.environment[f"ISTHMUS_{name}"]
    with odd_world.worker() as first:
        public_id = odd_world.ingest(f"odd:wait:{tmp_path / 'go'}")
        odd_world.until_it_reads(public_id)
        with odd_world.worker():
            odd_world.until(lambda: len(odd_world.rows(worker)) == 2)
            runner = runner_of(first)
            first.kill()
            killed_at = time.monotonic()
            rescued = _until_not_running(odd_world, public_id)
            assert rescued.error["type"] == "worker_lost"
            rescued_s = time.monotonic() - killed_at
            assert not runner.is_running() or runner.status() == "zombie"
            odd_world.until_it_reads(public_id, attempt=2)
            again_s = time.monotonic() - killed_at
            (tmp_path / "go").touch()
            odd_world.until_state(public_id, "succeeded", "failed")
    check_invariants(odd_world.engine, [public_id])
    record_figures(rescued_s=round(rescued_s, 1), started_again_s=round(again_s, 1))
    assert rescued_s < 30
    assert [entry.epoch for entry in ledger.read("start")] == [1, 2]


def _until_not_running(world: World, public_id: str) -> Any:
    return world.until(lambda: (row := world.row(public_id)).state != "running" and row, 40)
