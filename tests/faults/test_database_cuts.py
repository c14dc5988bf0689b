"""Connections that end in the middle: at every message of every operation, and by the server's own hand.

Whoever loses a connection does not know what became of the transaction. What each of them does then is done here, and
afterwards every job ends once with one result.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from service.contract import leases, outcomes, queue
from service.contract.dialects import after, open_engine
from service.contract.errors import Malformed
from service.contract.jobs import KINDS, IngestArgs
from service.contract.leases import Claim, WorkerInfo
from service.contract.outcomes import Batch, Saved
from service.contract.tables import checkpoint, job, job_event, job_progress, job_result, metric, worker
from service.contract.word import new_id
from tests.faults.conftest import NoopWorkers
from tests.faults.ledger import Ledger
from tests.faults.noop_worker import result_of
from tests.faults.proxy import Direction, Message, Proxy

POSTGRESQL_ONLY = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
ERROR: Final = {"type": "Transient", "message": "not now", "code": None}
TTL_S: Final = 600.0


class Bench:
    """A database, the same database through a proxy, and a worker."""

    def __init__(self, engine: sa.Engine, proxy: Proxy) -> None:
        self.engine = engine
        self.proxy = proxy
        self.cut_engine = open_engine(proxy.url, pool_size=1)
        self.me = self.register()

    def register(self, name: str | None = None) -> str:
        info = worker_info(name or new_id("worker"))
        leases.register(self.engine, info)
        return info.id

    def enqueue(self, engine: sa.Engine, unique_key: str | None = None) -> str:
        with engine.begin() as conn:
            return queue.enqueue(
                conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing"), unique_key=unique_key
            )

    def claim(self, engine: sa.Engine, worker_id: str, limit: int = 1) -> list[Claim]:
        return leases.claim(engine, worker_id=worker_id, lane="bulk", kinds=KINDS, ttl_s=TTL_S, limit=limit)

    def take(self, worker_id: str | None = None) -> Claim:
        self.enqueue(self.engine)
        (claim,) = self.claim(self.engine, worker_id or self.me)
        return claim

    def row(self, public_id: str) -> Any:
        with self.engine.connect() as conn:
            return conn.execute(sa.select(job).where(job.c.public_id == public_id)).one()

    def of_job(self, table: sa.Table, row_id: int) -> list[Any]:
        with self.engine.connect() as conn:
            return list(conn.execute(sa.select(table).where(table.c.job_id == row_id)))

    def events(self, row_id: int) -> Counter[str]:
        return Counter(row.type for row in self.of_job(job_event, row_id))

    def make_due(self) -> None:
        with self.engine.begin() as conn:
            due = sa.update(job).where(job.c.state == "scheduled")
            conn.execute(due.values(run_at=after(sa.literal(-1.0, sa.Double))))

    def work_off(self) -> None:
        """Give back what nobody knows to be claimed, then run everything to its end."""
        give_up_at = time.monotonic() + 10
        unfinished = sa.select(sa.func.count()).select_from(job).where(job.c.finished_at.is_(None))
        for lease in leases.leases(self.engine, self.me).values():
            outcomes.release(self.engine, lease, self.me)
        while True:
            self.make_due()
            leases.promote(self.engine)
            for claim in self.claim(self.engine, self.me, limit=32):
                assert outcomes.finish(self.engine, claim, self.me, result_of(claim)) == "succeeded"
            with self.engine.connect() as conn:
                if conn.execute(unfinished).scalar_one() == 0:
                    return
            assert time.monotonic() < give_up_at, "a job is neither claimed nor to be had"


def worker_info(name: str) -> WorkerInfo:
    return WorkerInfo(
        id=name,
        lanes=["bulk"],
        kinds=list(KINDS),
        host="here",
        boot="now",
        pid=1,
        endpoint=None,
        device="cpu",
        version="0",
    )


@pytest.fixture
def bench(database_url: str, engine: sa.Engine) -> Iterator[Bench]:
    with Proxy(database_url) as proxy:
        made = Bench(engine, proxy)
        yield made
        made.cut_engine.dispose()


@dataclass(frozen=True)
class Try:
    """One operation, what its caller does when the answer is lost, and what must hold after that."""

    run: Callable[[sa.Engine], object]
    again: Callable[[], object]
    check: Callable[[], None]


def _enqueue(bench: Bench) -> Try:
    key = new_id("up")

    def check() -> None:
        with bench.engine.connect() as conn:
            rows = conn.execute(sa.select(job).where(job.c.unique_key == key)).all()
        assert [row.state for row in rows] == ["queued"]
        assert bench.events(rows[0].id) == {"queued": 1}

    return Try(
        run=lambda engine: bench.enqueue(engine, key), again=lambda: bench.enqueue(bench.engine, key), check=check
    )


def _claim(bench: Bench) -> Try:
    public_id = bench.enqueue(bench.engine)

    def release() -> None:
        for lease in leases.leases(bench.engine, bench.me).values():
            outcomes.release(bench.engine, lease, bench.me)

    def check() -> None:
        release()
        row = bench.row(public_id)
        assert (row.state, row.attempt) == ("queued", 0)

    return Try(run=lambda engine: bench.claim(engine, bench.me), again=release, check=check)


def _record(bench: Bench) -> Try:
    claim = bench.take()
    batch = Batch(
        progress=(3, 10, None),
        events=[("note", {"x": 1})],
        metrics=[(1, {"loss": 0.5})],
        checkpoints=[Saved(step=1, artifact="checkpoints/x/1-1", digest="d" * 64, metrics={})],
    )

    def run(engine: sa.Engine) -> None:
        assert outcomes.record(engine, claim, bench.me, batch)

    def check() -> None:
        (progress,) = bench.of_job(job_progress, claim.id)
        assert (progress.done, progress.total) == (3, 10)
        assert [row.value for row in bench.of_job(metric, claim.id)] == [0.5]
        assert [row.step for row in bench.of_job(checkpoint, claim.id)] == [1]
        assert bench.events(claim.id)["note"] in (1, 2)  # what is reported again is told again
        assert outcomes.finish(bench.engine, claim, bench.me, result_of(claim)) == "succeeded"

    return Try(run=run, again=lambda: run(bench.engine), check=check)


def _finish(bench: Bench) -> Try:
    claim = bench.take()

    def run(engine: sa.Engine) -> object:
        return outcomes.finish(engine, claim, bench.me, result_of(claim))

    def check() -> None:
        assert bench.row(claim.public_id).state == "succeeded"
        assert [row.epoch for row in bench.of_job(job_result, claim.id)] == [claim.epoch]
        assert bench.events(claim.id)["succeeded"] == 1

    return Try(run=run, again=lambda: run(bench.engine), check=check)


def _fail(bench: Bench) -> Try:
    claim = bench.take()

    def run(engine: sa.Engine) -> object:
        return outcomes.fail(engine, claim, bench.me, ERROR, retry=True, delay_s=60)

    def check() -> None:
        row = bench.row(claim.public_id)
        assert (row.state, row.attempt, row.error["message"]) == ("scheduled", 1, "not now")
        assert bench.events(claim.id)["retrying"] == 1

    return Try(run=run, again=lambda: run(bench.engine), check=check)


def _release(bench: Bench) -> Try:
    claim = bench.take()

    def run(engine: sa.Engine) -> object:
        return outcomes.release(engine, claim, bench.me)

    def check() -> None:
        row = bench.row(claim.public_id)
        assert (row.state, row.attempt) == ("queued", 0)
        assert bench.events(claim.id)["released"] == 1

    return Try(run=run, again=lambda: run(bench.engine), check=check)


def _snooze(bench: Bench) -> Try:
    claim = bench.take()

    def run(engine: sa.Engine) -> object:
        return outcomes.snooze(engine, claim, bench.me, 60)

    def check() -> None:
        row = bench.row(claim.public_id)
        assert (row.state, row.attempt) == ("scheduled", 0)
        assert bench.events(claim.id)["snoozed"] == 1

    return Try(run=run, again=lambda: run(bench.engine), check=check)


def _cancel(bench: Bench) -> Try:
    public_id = bench.enqueue(bench.engine)

    def run(engine: sa.Engine) -> None:
        with engine.begin() as conn:
            queue.cancel(conn, "t", public_id)

    def again() -> None:
        try:
            run(bench.engine)
        except Malformed as error:
            assert error.code == "job_already_finished"  # noqa: PT017

    def check() -> None:
        row = bench.row(public_id)
        assert row.state == "cancelled"
        assert bench.events(row.id) == {"queued": 1, "cancelled": 1}

    return Try(run=run, again=again, check=check)


def _stop(bench: Bench) -> Try:
    claim = bench.take()
    with bench.engine.begin() as conn:
        assert queue.cancel(conn, "t", claim.public_id) == "running"

    def run(engine: sa.Engine) -> object:
        return outcomes.cancelled(engine, claim, bench.me)

    def check() -> None:
        assert bench.row(claim.public_id).state == "cancelled"
        assert bench.events(claim.id)["cancelled"] == 1

    return Try(run=run, again=lambda: run(bench.engine), check=check)


def _retry(bench: Bench) -> Try:
    claim = bench.take()
    outcomes.fail(bench.engine, claim, bench.me, ERROR, retry=False)

    def run(engine: sa.Engine) -> None:
        with engine.begin() as conn:
            queue.retry(conn, "t", claim.public_id)

    def again() -> None:
        try:
            run(bench.engine)
        except Malformed as error:
            assert error.code == "job_not_retryable"  # noqa: PT017

    def check() -> None:
        row = bench.row(claim.public_id)
        assert (row.state, row.attempt) == ("queued", 0)
        assert bench.events(claim.id)["queued"] == 2

    return Try(run=run, again=again, check=check)


def _heartbeat(bench: Bench) -> Try:
    def check() -> None:
        assert leases.heartbeat(bench.engine, bench.me).alive

    return Try(run=lambda engine: leases.heartbeat(engine, bench.me), again=lambda: None, check=check)


def _rescue(bench: Bench) -> Try:
    ghost = bench.register()
    claim = bench.take(ghost)
    leases.unregister(bench.engine, ghost)

    def check() -> None:
        row = bench.row(claim.public_id)
        assert (row.state, row.attempt, row.error["type"]) == ("scheduled", 1, "worker_lost")
        assert bench.events(claim.id)["retrying"] == 1

    return Try(
        run=lambda engine: leases.rescue(engine, ttl_s=TTL_S),
        again=lambda: until(lambda: leases.rescue(bench.engine, ttl_s=TTL_S) or bench.row(claim.public_id).error),
        check=check,
    )


def _promote(bench: Bench) -> Try:
    claim = bench.take()
    outcomes.fail(bench.engine, claim, bench.me, ERROR, retry=True, delay_s=0)

    def check() -> None:
        assert bench.row(claim.public_id).state == "queued"

    return Try(
        run=leases.promote,
        again=lambda: until(lambda: leases.promote(bench.engine) or bench.row(claim.public_id).state == "queued"),
        check=check,
    )


def _register(bench: Bench) -> Try:
    # A start under one's own id buries what an earlier one left: it may be one's own, of which one knows nothing.
    name = new_id("worker")

    def again() -> None:
        leases.forget(bench.engine, [name])
        leases.register(bench.engine, worker_info(name))

    def check() -> None:
        with bench.engine.connect() as conn:
            assert conn.execute(sa.select(sa.func.count()).where(worker.c.id == name)).scalar_one() == 1

    return Try(run=lambda engine: leases.register(engine, worker_info(name)), again=again, check=check)


OPERATIONS: Final[dict[str, Callable[[Bench], Try]]] = {
    "enqueue": _enqueue,
    "claim": _claim,
    "record": _record,
    "finish": _finish,
    "fail": _fail,
    "release": _release,
    "snooze": _snooze,
    "cancel": _cancel,
    "stop": _stop,
    "retry": _retry,
    "heartbeat": _heartbeat,
    "rescue": _rescue,
    "promote": _promote,
    "register": _register,
}


def until(condition: Callable[[], Any], timeout_s: float = 5) -> None:
    """Wait for what a dying backend still locks."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def _at(direction: Direction, number: int) -> Callable[[Message], bool]:
    return lambda message: message.direction == direction and message.number == number


def _survives(bench: Bench, attempt: Try) -> bool:
    """Run an operation; return whether the connection lived to tell its end."""
    try:
        attempt.run(bench.cut_engine)
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        return False
    return True


@POSTGRESQL_ONLY
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("direction", ["ask", "answer"])
def test_a_connection_cut_at_any_message_leaves_a_job_that_ends_once(
    bench: Bench, operation: str, direction: Direction, record_property: Callable[[str, object], None]
) -> None:
    lost, number = 0, -1
    cut = True
    while cut:
        number += 1
        attempt = OPERATIONS[operation](bench)
        with bench.cut_engine.connect():
            pass  # so that the first message is the operation's own
        bench.proxy.arm(_at(direction, number))
        before = bench.proxy.num_cuts
        if not _survives(bench, attempt):
            lost += 1
            attempt.again()
        bench.proxy.disarm()
        attempt.check()
        bench.work_off()
        cut = bench.proxy.num_cuts > before
    # The end of the last message is told by nobody: its loss need not be noticed.
    assert lost >= number - 1
    assert number > 0
    record_property("messages", number)


@POSTGRESQL_ONLY
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_backend_terminated_before_any_statement_leaves_a_job_that_ends_once(bench: Bench, operation: str) -> None:
    lost, number = 0, -1
    killed = threading.Event()
    killed.set()
    while killed.is_set():
        number += 1
        attempt = OPERATIONS[operation](bench)
        with bench.cut_engine.connect() as conn:
            victim = conn.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        seen = 0
        killed = threading.Event()

        def terminate(
            message: Message, victim: int = victim, number: int = number, killed: threading.Event = killed
        ) -> bool:
            nonlocal seen
            if message.direction == "ask" and message.body[:1] in b"QP":  # a simple query, or the start of another
                seen += 1
                if seen == number + 1:
                    with bench.engine.connect() as conn:
                        conn.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": victim})
                    killed.set()
            return False

        bench.proxy.arm(terminate)
        if not _survives(bench, attempt):
            assert killed.wait(10)
            lost += 1
            attempt.again()
        bench.proxy.disarm()
        attempt.check()
        bench.work_off()
    assert lost == number
    assert number > 0


@POSTGRESQL_ONLY
def test_a_worker_that_never_hears_of_its_commits_runs_no_job_twice(
    database_url: str,
    engine: sa.Engine,
    ledger: Ledger,
    enqueue_many: Callable[..., list[str]],
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
) -> None:
    acknowledged = enqueue_many(80)
    with Proxy(database_url) as proxy:
        num_commits = 0

        def every_seventh(message: Message) -> bool:
            nonlocal num_commits
            num_commits += message.says_committed
            return message.says_committed and num_commits % 7 == 0

        proxy.arm(every_seventh, once=False)
        workers = NoopWorkers(proxy.url, ledger)
        try:
            # Leases that outlive the test: nobody but the worker itself can put a job back.
            for _ in range(2):
                workers.start("--ttl-s", "600", "--heartbeat-s", "0.1")
            until_all_ended(engine)
        finally:
            workers.stop()
        assert proxy.num_cuts > 15
    assert check_invariants(engine, acknowledged) == {"succeeded": 80}
    assert Counter(entry.job for entry in ledger.read("start")) == dict.fromkeys(acknowledged, 1)


@POSTGRESQL_ONLY
def test_a_result_whose_commit_was_acknowledged_to_nobody_stands_as_it_is(bench: Bench) -> None:
    claim = bench.take()
    with bench.cut_engine.connect():
        pass
    bench.proxy.arm(lambda message: message.says_committed)
    with pytest.raises(DBAPIError):
        outcomes.finish(bench.cut_engine, claim, bench.me, result_of(claim))
    assert bench.row(claim.public_id).state == "succeeded"
    # Whoever looks again is refused, whatever the second result says: the first one counts.
    other = result_of(claim).model_copy(update={"num_samples": 2})
    assert outcomes.finish(bench.cut_engine, claim, bench.me, other) in ("succeeded", None)
    (result,) = bench.of_job(job_result, claim.id)
    assert result.body["num_samples"] == 1
    assert bench.claim(bench.engine, bench.me) == []
