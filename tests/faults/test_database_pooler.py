"""Behind PgBouncer in transaction mode: no session outlives a transaction, hints do not arrive, polling does it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from service.contract import queue
from service.contract.dialects import open_engine
from service.contract.jobs import IngestArgs
from tests.faults.bouncer import PgBouncer
from tests.faults.conftest import NoopWorkers
from tests.faults.ledger import Ledger
from tests.supervisors import World

POSTGRESQL_ONLY = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def pooled_url(database_url: str) -> Iterator[str]:
    with PgBouncer(database_url) as bouncer:
        yield bouncer.url_of(database_url)


@POSTGRESQL_ONLY
def test_more_workers_than_connections_do_every_job_once_through_a_pooler(
    pooled_url: str,
    engine: sa.Engine,
    ledger: Ledger,
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
) -> None:
    pooled = open_engine(pooled_url)
    acknowledged: list[str] = []
    for _ in range(60):
        with pooled.begin() as conn:
            acknowledged.append(queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing")))
    workers = NoopWorkers(pooled_url, ledger)
    try:
        for _ in range(4):  # of two connections each, and a heartbeat
            workers.start("--ttl-s", "20", "--heartbeat-s", "0.2")
        until_all_ended(engine)
    finally:
        workers.stop()
    pooled.dispose()
    assert check_invariants(engine, acknowledged) == {"succeeded": 60}
    assert Counter(entry.job for entry in ledger.read("start")) == dict.fromkeys(acknowledged, 1)


@POSTGRESQL_ONLY
def test_a_supervisor_behind_a_pooler_works_by_polling(world: World, pooled_url: str) -> None:
    feed = world.feed()
    with world.worker(ISTHMUS_DATABASE_URL=pooled_url):
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        with world.engine.begin() as conn:
            queue.cancel(conn, "t", public_id)
        assert world.until_state(public_id, "cancelled", "failed").state == "cancelled"
        other = world.ingest("nowhere")
        world.until_state(other, "failed")
