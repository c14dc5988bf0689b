"""Jobs that are the fault themselves: that kill their runner, that nobody knows, whose result is too large."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from service.contract.jobs import POLICIES
from service.contract.tables import job, job_event, job_result
from tests.faults.conftest import NoopWorkers
from tests.faults.ledger import Ledger
from tests.supervisors import World

MAX_ATTEMPTS = POLICIES["ingest"].max_attempts
LIMIT_BYTES = 1 << 20  # of a result


@pytest.mark.parametrize(
    ("database_url", "source"),
    [("sqlite", "odd:exit:139"), ("postgresql", "odd:signal:11")],
    indirect=["database_url"],
    ids=["sqlite-exit 139", "postgresql-SIGSEGV"],
)
def test_a_job_that_kills_its_runner_each_time_fails_after_its_attempts_with_growing_pauses(
    source: str, odd_world: World, ledger: Ledger, check_invariants: Callable[..., Counter[str]]
) -> None:
    public_id = odd_world.ingest(source)
    with odd_world.worker():
        for attempt in range(1, MAX_ATTEMPTS):
            row = odd_world.until(
                lambda attempt=attempt: (
                    (row := odd_world.row(public_id)).attempt == attempt and row.state != "running" and row
                )
            )
            assert row.error["type"] == "RunnerDied"
            assert ("SIGSEGV" if "signal" in source else "status 139") in row.error["message"]
            with odd_world.engine.begin() as conn:  # the pauses themselves are not waited for
                conn.execute(sa.update(job).where(job.c.state == "scheduled").values(run_at=job.c.created_at))
        row = odd_world.until_state(public_id, "failed")
        other = odd_world.ingest("odd:done")
        odd_world.until_state(other, "succeeded")
    assert (row.attempt, row.lease_epoch, row.error["code"]) == (MAX_ATTEMPTS, MAX_ATTEMPTS, "runner_died")
    crashes = [entry.attempt for entry in ledger.read("start") if entry.job == public_id]
    assert crashes == list(range(1, MAX_ATTEMPTS + 1))
    retries = [event.detail for event in odd_world.rows(job_event) if event.type == "retrying"]
    assert [retry["attempt"] for retry in retries] == list(range(1, MAX_ATTEMPTS))
    assert all(
        0 <= retry["delay_s"] <= 2 ** retry["attempt"] for retry in retries
    )  # full jitter under a bound that doubles
    check_invariants(odd_world.engine, [public_id, other])


def test_a_job_that_kills_its_workers_each_time_fails_after_its_attempts(
    odd_world: World, check_invariants: Callable[..., Counter[str]]
) -> None:
    public_id = odd_world.ingest("odd:done")
    with odd_world.engine.begin() as conn:
        conn.execute(sa.update(job).values(max_attempts=2))
    for attempt in (1, 2):
        with odd_world.worker(ISTHMUS_SABOTAGE="claimed") as process:
            process.wait(20)
        assert odd_world.row(public_id).attempt == attempt
    with odd_world.worker():
        row = odd_world.until_state(public_id, "failed", "succeeded")
        assert (row.state, row.attempt, row.error["type"]) == ("failed", 2, "worker_lost")
    check_invariants(odd_world.engine, [public_id])


def test_a_kind_that_no_worker_knows_waits_for_one_that_does_and_holds_up_nobody(
    odd_world: World, noop_workers: NoopWorkers, ledger: Ledger, check_invariants: Callable[..., Counter[str]]
) -> None:
    from_the_future = odd_world.ingest("odd:done")
    with odd_world.engine.begin() as conn:
        conn.execute(sa.update(job).values(kind="from_the_future"))
    process = noop_workers.start()
    with odd_world.worker():
        known = [odd_world.ingest("odd:done") for _ in range(4)]
        for public_id in known:
            odd_world.until_state(public_id, "succeeded")
        row = odd_world.row(from_the_future)
        assert (row.state, row.attempt, row.lease_epoch) == ("queued", 0, 0)
        with odd_world.engine.begin() as conn:  # a worker that knows it is deployed
            conn.execute(sa.update(job).where(job.c.public_id == from_the_future).values(kind="ingest"))
        odd_world.until_state(from_the_future, "succeeded")
    process.terminate()
    process.wait()
    assert check_invariants(odd_world.engine, [from_the_future, *known]) == {"succeeded": 5}


@pytest.mark.parametrize(
    ("database_url", "num_bytes", "kind", "reason"),
    [
        ("sqlite", 2 * LIMIT_BYTES, "TooLarge", f"of at most {LIMIT_BYTES:,}"),
        ("postgresql", 2 * LIMIT_BYTES, "TooLarge", f"of at most {LIMIT_BYTES:,}"),
        ("sqlite", 100_000_000, "RunnerBroken", "a message of more than"),
    ],
    indirect=["database_url"],
    ids=["sqlite-2 MiB", "postgresql-2 MiB", "sqlite-100 MB"],
)
def test_a_result_larger_than_the_limit_fails_the_job_for_good_and_says_so(
    num_bytes: int, kind: str, reason: str, odd_world: World, check_invariants: Callable[..., Counter[str]]
) -> None:
    with odd_world.worker():
        public_id = odd_world.ingest(f"odd:large:{num_bytes}")
        row = odd_world.until_state(public_id, "failed", "succeeded")
        assert (row.state, row.attempt, row.error["type"]) == ("failed", 1, kind)
        assert reason in row.error["message"]
        assert len(str(row.error)) < 2000
        other = odd_world.ingest("odd:done")
        odd_world.until_state(other, "succeeded")
    assert len(odd_world.rows(job_result)) == 1
    assert check_invariants(odd_world.engine, [public_id, other]) == {"failed": 1, "succeeded": 1}
