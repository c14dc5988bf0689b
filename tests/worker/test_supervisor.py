from __future__ import annotations

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from service.contract import leases, queue
from service.contract.tables import dataset, job, job_event, job_progress, job_result, worker
from tests.supervisors import World, children, runner_of

SQLITE_ONLY = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


def _has_torch(process: psutil.Process) -> bool:
    return any("libtorch" in line.path for line in process.memory_maps())


def test_a_job_runs_to_its_end_and_its_result_is_stored(world: World) -> None:
    feed = world.feed()
    with world.worker() as process:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        assert not _has_torch(runner_of(process))
        feed.end()
        row = world.until_state(public_id, "succeeded", "failed")
        assert row.state == "succeeded", row.error
        assert [found.state for found in world.rows(dataset)] == ["ready"]
        (result,) = world.rows(job_result)
        assert result.body["num_samples"] > 0
        (progress,) = world.rows(job_progress)
        assert progress.done == progress.total == result.body["num_samples"] + result.body["num_rejected"]
        assert [event.type for event in world.rows(job_event)] == ["queued", "started", "succeeded"]
        world.until(lambda: not list((world.data / "scratch").glob("*/*")))
    assert f'"event": "claimed", "job": "{public_id}", "attempt": 1, "epoch": 1' in world.log()


@SQLITE_ONLY
def test_a_job_that_cannot_succeed_fails_for_good_and_one_of_an_unknown_kind_stays_queued(world: World) -> None:
    unknown = world.ingest("nowhere")
    with world.engine.begin() as conn:
        conn.execute(sa.update(job).values(kind="from_the_future"))
    with world.worker():
        public_id = world.ingest("store:uploads/up_0000000000000000000000000a/nothing.tar")
        row = world.until_state(public_id, "failed", "succeeded")
        assert (row.state, row.attempt, row.error["type"]) == ("failed", 1, "Permanent")
        assert "traceback" not in row.error
        assert [found.state for found in world.rows(dataset)] == ["ingesting", "failed"]
        assert world.row(unknown).state == "queued"


@SQLITE_ONLY
def test_a_killed_runner_costs_an_attempt_and_the_job_is_tried_again(world: World) -> None:
    feed = world.feed()
    with world.worker() as process:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        runner_of(process).kill()
        row = world.until(lambda: (row := world.row(public_id)).error and row)
        assert row.error["type"] == "RunnerDied"
        assert "SIGKILL" in row.error["message"]
        world.until_it_reads(public_id, attempt=2)
        feed.end()
        assert world.until_state(public_id, "succeeded", "failed").lease_epoch == 2


def test_a_killed_supervisor_leaves_nothing_running_and_another_takes_its_job(world: World) -> None:
    feed = world.feed()
    with world.worker() as first:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        with world.worker():
            world.until(lambda: len(world.rows(worker)) == 2)
            runner = runner_of(first)
            first.kill()
            world.until(lambda: not runner.is_running() or runner.status() == psutil.STATUS_ZOMBIE, 5)
            world.until_it_reads(public_id, attempt=2)
            assert len(world.rows(worker)) == 1
            feed.end()
            assert world.until_state(public_id, "succeeded", "failed").state == "succeeded"
            assert len(world.rows(job_result)) == 1


@SQLITE_ONLY
def test_a_worker_that_starts_again_on_its_host_waits_for_nobody(world: World) -> None:
    feed = world.feed()
    patient = {"ISTHMUS_WORKER_TTL_S": "600"}
    with world.worker(**patient) as first:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        first.kill()
        first.wait()
        (dead,) = world.rows(worker)
        with world.worker(**patient):
            world.until_it_reads(public_id, attempt=2)
            assert [row.id for row in world.rows(worker)] != [dead.id]
            assert not (world.data / "scratch" / dead.id).exists()


def test_sigterm_gives_the_job_back_without_burning_the_attempt(world: World) -> None:
    feed = world.feed()
    with world.worker() as process:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    row = world.row(public_id)
    assert (row.state, row.attempt, row.lease_epoch) == ("queued", 0, 1)
    assert world.rows(worker) == []
    assert "released" in [event.type for event in world.rows(job_event)]
    assert not list((world.data / "scratch").iterdir())


@SQLITE_ONLY
def test_a_second_sigterm_and_sigint_wait_for_nobody(world: World) -> None:
    for signals in ([signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]):
        feed = world.feed()
        with world.worker(ISTHMUS_SHUTDOWN_GRACE_S="60") as process:
            public_id = world.ingest(feed.source)
            world.until_it_reads(public_id)
            runner = runner_of(process)
            runner.suspend()  # so that it cannot do what it is asked
            for number in signals:
                process.send_signal(number)
                time.sleep(0.05)  # two pending signals of one kind are one
            assert process.wait(10) == 0
            assert not runner.is_running()
        assert (world.row(public_id).state, world.row(public_id).attempt) == ("queued", 0)
        with world.engine.begin() as conn:
            queue.cancel(conn, "t", public_id)


@SQLITE_ONLY
def test_a_running_job_stops_when_it_is_cancelled(world: World) -> None:
    feed = world.feed()
    with world.worker(ISTHMUS_CANCEL_GRACE_S="60"):
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        with world.engine.begin() as conn:
            queue.cancel(conn, "t", public_id)
        assert world.until_state(public_id, "cancelled", "failed").state == "cancelled"
        assert [found.state for found in world.rows(dataset)] == ["failed"]


@SQLITE_ONLY
def test_a_runner_that_ignores_a_cancel_is_killed(world: World) -> None:
    feed = world.feed()
    with world.worker() as process:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        runner = runner_of(process)
        runner.suspend()
        with world.engine.begin() as conn:
            queue.cancel(conn, "t", public_id)
        assert world.until_state(public_id, "cancelled", "failed").state == "cancelled"
        assert not runner.is_running()
        other = world.ingest("store:uploads/up_0000000000000000000000000a/nothing.tar")
        world.until_state(other, "failed")


@SQLITE_ONLY
def test_a_job_past_its_deadline_is_killed_and_tried_again(world: World) -> None:
    feed = world.feed()
    with world.worker():
        public_id = world.ingest(feed.source)
        # The deadline travels with the claim: set it before the job is claimed again.
        world.until_it_reads(public_id)
        with world.engine.begin() as conn:
            conn.execute(sa.update(job).values(deadline_s=1))
        runner_of(world.workers[0]).kill()
        row = world.until(lambda: (row := world.row(public_id)).attempt == 2 and row.state != "running" and row)
        assert row.error["code"] == "deadline_exceeded"


@SQLITE_ONLY
def test_a_worker_that_was_declared_dead_kills_its_job_and_registers_anew(world: World) -> None:
    feed = world.feed()
    with world.worker() as process:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        runner = runner_of(process)
        (before,) = world.rows(worker)
        leases.forget(world.engine, [before.id])
        world.until(lambda: not runner.is_running())
        world.until_it_reads(public_id, attempt=2)
        (after,) = world.rows(worker)
        assert after.id != before.id
        feed.end()
        assert world.until_state(public_id, "succeeded", "failed").state == "succeeded"
    assert "declared dead" in world.log()


@SQLITE_ONLY
def test_a_lost_lease_kills_the_child_and_its_writes_are_refused(world: World) -> None:
    feed = world.feed()
    with world.worker() as process:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        runner = runner_of(process)
        with world.engine.begin() as conn:  # as if another worker had it
            conn.execute(sa.update(job).values(lease_epoch=job.c.lease_epoch + 1, worker_id="another"))
        world.until(lambda: not runner.is_running())
        world.until(lambda: '"state": "lost"' in world.log())
        assert world.rows(job_result) == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_absent_database_is_waited_for(world: World) -> None:
    feed = world.feed()
    with world.worker() as process:
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        with _away(world):
            world.until(lambda: "does not answer" in world.log())
            feed.end()
            time.sleep(0.5)
            assert process.poll() is None
        assert world.until_state(public_id, "succeeded", "failed").state == "succeeded"
        assert world.row(public_id).lease_epoch == 1
        world.until(lambda: "answers again" in world.log())


@contextmanager
def _away(world: World) -> Generator[None]:
    """Take the job table away for a while, as an outage does: every statement of the worker fails."""
    with world.engine.begin() as conn:
        conn.execute(sa.text("ALTER TABLE job RENAME TO job_away"))
    try:
        yield
    finally:
        with world.engine.begin() as conn:
            conn.execute(sa.text("ALTER TABLE job_away RENAME TO job"))


@SQLITE_ONLY
def test_a_train_job_gets_the_idle_runner_and_ingest_a_cold_one(world: World) -> None:
    with world.worker(ISTHMUS_PRELOAD="true") as process:
        idle = world.until(lambda: children(process, "--preload"))[0]
        world.until(lambda: _has_torch(idle))
        public_id = world.ingest("store:uploads/up_0000000000000000000000000a/nothing.tar")
        world.until_state(public_id, "failed")
        assert idle.is_running()
        idle.kill()
        world.until(lambda: not idle.is_running())
        again = world.until(lambda: children(process, "--preload"))
        assert again


@SQLITE_ONLY
def test_settings_that_cannot_work_end_the_worker_with_a_message(world: World) -> None:
    wrong = {"ISTHMUS_LANES": "train,nonsense"}
    with world.worker(**wrong) as process:
        assert process.wait(30) == 2
    assert "nonsense" in world.log()


@SQLITE_ONLY
def test_the_inference_process_is_started_again_and_dies_with_its_supervisor(world: World) -> None:
    with world.worker(ISTHMUS_LANES="serve") as process:
        (first,) = world.until(lambda: children(process, "worker.serving"))
        first.kill()
        second = world.until(lambda: [x for x in children(process, "worker.serving") if x.pid != first.pid])[0]
        (row,) = world.until(lambda: world.rows(worker))
        assert row.endpoint.startswith("unix:")
        world.until(Path(row.endpoint.removeprefix("unix:")).exists)
        process.kill()
        world.until(lambda: not second.is_running() or second.status() == psutil.STATUS_ZOMBIE, 10)
