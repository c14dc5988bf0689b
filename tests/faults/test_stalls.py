"""What stands still: a frozen worker, a frozen host, a computation that never lets go, a database that makes wait."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.contract.tables import job, job_result, worker
from tests.faults.ledger import Ledger
from tests.supervisors import World, runner_of

TTL_S = 2.5  # of a World's workers
STALL_S = TTL_S + 1.5
# What happens outside of the database, and takes long: with PostgreSQL only in the long run.
BOTH_AT_LENGTH = pytest.mark.parametrize(
    "database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)


def test_a_frozen_worker_loses_its_job_and_its_late_result_and_starts_again_under_a_new_id(
    odd_world: World, ledger: Ledger, tmp_path: Path, check_invariants: Callable[..., Counter[str]]
) -> None:
    with odd_world.worker() as frozen:
        public_id = odd_world.ingest(f"odd:wait:{tmp_path}/go-{{epoch}}")
        odd_world.until_it_reads(public_id)
        (before,) = odd_world.rows(worker)
        with odd_world.worker():
            odd_world.until(lambda: len(odd_world.rows(worker)) == 2)
            frozen.send_signal(signal.SIGSTOP)
            odd_world.until_it_reads(public_id, attempt=2)
            (tmp_path / "go-1").touch()  # its runner went on, and comes to an end that nobody hears yet
            odd_world.until(lambda: ledger.read("finish"))
            frozen.send_signal(signal.SIGCONT)
            odd_world.until(lambda: any("ended" in x and "lost" in x for x in odd_world.log(0).splitlines()))
            odd_world.until(lambda: "declared dead" in odd_world.log(0) and len(odd_world.rows(worker)) == 2)
            assert before.id not in [row.id for row in odd_world.rows(worker)]
            row = odd_world.row(public_id)
            assert (row.state, row.lease_epoch) == ("running", 2)  # the other's work is not touched
            assert odd_world.rows(job_result) == []
            (tmp_path / "go-2").touch()
            odd_world.until_state(public_id, "succeeded", "failed")
    (result,) = odd_world.rows(job_result)
    assert result.epoch == 2
    assert check_invariants(odd_world.engine, [public_id]) == {"succeeded": 1}


@BOTH_AT_LENGTH
def test_workers_that_were_all_frozen_go_on_with_their_jobs(
    odd_world: World, ledger: Ledger, tmp_path: Path, check_invariants: Callable[..., Counter[str]]
) -> None:
    # A host that was suspended, a paused container: everybody is late, so nobody may judge.
    with _two_at_work(odd_world, tmp_path) as (workers, public_ids):
        for _ in range(2):
            for process in workers:
                process.send_signal(signal.SIGSTOP)
            time.sleep(STALL_S)
            for process in workers:
                process.send_signal(signal.SIGCONT)
            time.sleep(0.5)
    assert check_invariants(odd_world.engine, public_ids) == {"succeeded": 2}
    assert [entry.epoch for entry in ledger.read("start")] == [1, 1]


def test_workers_that_wait_for_a_locked_database_keep_their_jobs(
    odd_world: World, ledger: Ledger, tmp_path: Path, check_invariants: Callable[..., Counter[str]]
) -> None:
    # On SQLite nobody can write, so all heartbeats are late; on PostgreSQL they go on beside stuck supervisors.
    with _two_at_work(odd_world, tmp_path) as (_, public_ids):
        for _ in range(2 if odd_world.engine.dialect.name == "sqlite" else 1):
            with odd_world.engine.begin() as conn:
                if conn.dialect.name == "postgresql":
                    conn.execute(sa.text("LOCK TABLE job IN ACCESS EXCLUSIVE MODE"))
                time.sleep(STALL_S)
                if conn.dialect.name == "postgresql":
                    late = sa.text("SELECT max(extract(epoch FROM clock_timestamp() - last_seen)) FROM worker")
                    assert conn.execute(late).scalar_one() < TTL_S, "a stuck supervisor's heartbeat stopped"
            time.sleep(0.5)
    assert check_invariants(odd_world.engine, public_ids) == {"succeeded": 2}
    assert [entry.epoch for entry in ledger.read("start")] == [1, 1]


@contextmanager
def _two_at_work(world: World, folder: Path) -> Generator[tuple[list[subprocess.Popen[bytes]], list[str]]]:
    """Run two supervisors with a job each, both well for longer than a lease; afterwards let the jobs end."""
    with ExitStack() as stack:
        workers = [stack.enter_context(world.worker()) for _ in range(2)]
        public_ids = [world.ingest(f"odd:wait:{folder / 'go'}") for _ in workers]
        for public_id in public_ids:
            world.until_it_reads(public_id)
        time.sleep(TTL_S + 0.5)  # from now on each of them may judge the other
        yield workers, public_ids
        (folder / "go").touch()
        for public_id in public_ids:
            world.until_state(public_id, "succeeded", "failed")


@BOTH_AT_LENGTH
def test_a_job_that_never_lets_go_of_the_interpreter_keeps_its_lease(
    odd_world: World, ledger: Ledger, check_invariants: Callable[..., Counter[str]]
) -> None:
    with odd_world.worker(), odd_world.worker():
        odd_world.until(lambda: len(odd_world.rows(worker)) == 2)
        public_id = odd_world.ingest("odd:hold:4")
        odd_world.until_it_reads(public_id)
        held_from = time.monotonic()
        oldest_s = 0.0
        while (row := odd_world.row(public_id)).state == "running":
            assert time.monotonic() - held_from < 60
            seen = [found.last_seen.timestamp() for found in odd_world.rows(worker)]
            assert len(seen) == 2
            oldest_s = max(oldest_s, time.time() - min(seen))
            time.sleep(0.05)
        assert time.monotonic() - held_from > TTL_S
        assert oldest_s < TTL_S
        assert (row.state, row.attempt, row.lease_epoch) == ("succeeded", 1, 1)
    assert [entry.epoch for entry in ledger.read("start")] == [1]
    check_invariants(odd_world.engine, [public_id])


@BOTH_AT_LENGTH
def test_a_hung_job_is_killed_at_its_deadline_each_time_and_others_are_served(
    odd_world: World, ledger: Ledger, check_invariants: Callable[..., Counter[str]]
) -> None:
    hung = odd_world.ingest("odd:hang")
    with odd_world.engine.begin() as conn:
        conn.execute(sa.update(job).values(deadline_s=4, max_attempts=2))
    with odd_world.worker() as process:
        odd_world.until_it_reads(hung)
        runner = runner_of(process)
        with odd_world.engine.begin() as conn:
            conn.execute(sa.update(job).values(deadline_s=1))  # of the second attempt
        other = odd_world.ingest("odd:done")
        row = odd_world.until(lambda: (row := odd_world.row(hung)).state == "scheduled" and row)
        assert (row.error["type"], row.error["code"]) == ("Deadline", "deadline_exceeded")
        odd_world.until(lambda: not runner.is_running())
        odd_world.until_state(other, "succeeded", "failed")
        row = odd_world.until_state(hung, "failed")
        assert (row.attempt, row.error["code"]) == (2, "deadline_exceeded")
        last = odd_world.ingest("odd:done")
        odd_world.until_state(last, "succeeded")
    assert Counter(entry.job for entry in ledger.read("start"))[hung] == 2
    assert check_invariants(odd_world.engine, [hung, other, last]) == {"succeeded": 2, "failed": 1}
