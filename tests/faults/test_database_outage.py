"""The database goes away: killed, restarted, unreachable, silent, busy. Nothing acknowledged is lost; all go on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from service.app import create_app
from service.contract import leases, queue
from service.contract.dialects import open_engine
from service.contract.host import boot_id, host_name
from service.contract.jobs import IngestArgs
from service.contract.settings import Settings
from service.contract.tables import job, job_event, job_result, worker
from service.contract.wake import Listener
from service.deps import Service, service_of
from tests.faults.conftest import NoopWorkers
from tests.faults.ledger import Ledger
from tests.faults.proxy import Proxy
from tests.faults.servers import DurableServer, fill, until
from tests.faults.test_database_cuts import worker_info
from tests.supervisors import World
from worker.heartbeat import Heartbeat

POSTGRESQL_ONLY = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
DATASET: Final = {"name": "captions", "uri": "s3://bucket/captions.jsonl", "modalities": {"text": "caption"}}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def durable() -> Iterator[DurableServer]:
    server = DurableServer()
    yield server
    server.stop()


@asynccontextmanager
async def serve(folder: Path, url: str) -> AsyncGenerator[tuple[httpx.AsyncClient, Service]]:
    app = create_app(Settings(data=folder / "api", database_url=url, store_url=str(folder / "store")))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client, service_of(app)


def enqueue(engine: sa.Engine) -> str:
    with engine.begin() as conn:
        return queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing"))


class Submitter:
    """A thread that enqueues for as long as it may and remembers what was acknowledged."""

    def __init__(self, url: str) -> None:
        self.acknowledged: list[str] = []
        self.num_errors = 0
        self._engine = open_engine(url, pool_size=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        self._engine.dispose()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            try:
                self.acknowledged.append(enqueue(self._engine))
            except DBAPIError:
                self.num_errors += 1
                time.sleep(0.05)


@pytest.mark.parametrize("num_kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_server_has_kept_all_that_it_acknowledged_and_the_workers_go_on(
    durable: DurableServer,
    num_kills: int,
    ledger: Ledger,
    record_property: Callable[[str, object], None],
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
) -> None:
    url = durable.make_database()
    engine = open_engine(url)
    workers = NoopWorkers(url, ledger)
    submitters = [Submitter(url) for _ in range(2)]
    for _ in range(2):
        workers.start("--ttl-s", "2", "--heartbeat-s", "0.3", "--batch", "4")
    try:
        for _ in range(num_kills):
            num = len(ledger.read("finish"))
            until(lambda num=num: len(ledger.read("finish")) > num + 40, 60)
            durable.kill()
            before = len(ledger.read("finish"))
            time.sleep(0.5)
            durable.start()
            reconnected_s = until(lambda before=before: len(ledger.read("finish")) > before, 30)
            record_property("reconnected_s", reconnected_s)
        for submitter in submitters:
            submitter.stop()
            assert submitter.num_errors > 0
        until_all_ended(engine, 90)
    finally:
        for submitter in submitters:
            submitter.stop()
        workers.stop()
    acknowledged = [public_id for submitter in submitters for public_id in submitter.acknowledged]
    record_property("acknowledged", len(acknowledged))
    assert set(check_invariants(engine, acknowledged)) == {"succeeded"}
    with engine.connect() as conn:
        rows = conn.execute(sa.select(job.c.public_id, job_result.c.epoch).join(job_result)).all()
    kept = {(row.public_id, row.epoch) for row in rows}
    assert {(entry.job, entry.epoch) for entry in ledger.read("finish")} <= kept
    engine.dispose()


@pytest.mark.anyio
async def test_a_fast_restart_is_503_to_callers_and_nothing_to_a_running_job(
    durable: DurableServer, tmp_path: Path
) -> None:
    url = durable.make_database()
    engine = open_engine(url)
    (tmp_path / "data").mkdir()
    world = World(url, engine, tmp_path / "data")
    feed = world.feed()
    answers: list[httpx.Response] = []
    async with serve(tmp_path, url) as (client, _service):
        # The lease outlives the restart.
        with world.worker(ISTHMUS_WORKER_TTL_S="20"):
            public_id = world.ingest(feed.source)
            world.until_it_reads(public_id)
            restarted = threading.Thread(target=lambda: [durable.restart() for _ in range(3)])
            restarted.start()
            while restarted.is_alive() or answers[-1].status_code != 202:
                answers += [await client.post("/v1/datasets", json=DATASET), await client.get("/v1/jobs")]
                assert len(answers) < 20_000
                if answers[-2].status_code == 202 and not restarted.is_alive():
                    break
            feed.end()
            engine.dispose()  # ours were cut as well
            assert world.until_state(public_id, "succeeded", "failed").state == "succeeded"
            assert world.row(public_id).lease_epoch == 1
    seen = Counter(answer.status_code for answer in answers)
    assert set(seen) <= {200, 202, 503}
    assert seen[503] > 0
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
    accepted = [answer.json()["job"]["id"] for answer in answers if answer.status_code == 202]
    with engine.connect() as conn:
        assert set(accepted) <= set(conn.execute(sa.select(job.c.public_id)).scalars())
    engine.dispose()


@pytest.mark.anyio
async def test_a_full_disk_is_503_and_loses_nothing_and_work_goes_on_when_there_is_room(
    durable: DurableServer,
    ledger: Ledger,
    tmp_path: Path,
    until_all_ended: Callable[..., None],
    check_invariants: Callable[..., Counter[str]],
) -> None:
    with durable.small_database("24m") as (url, folder):
        engine = open_engine(url)
        workers = NoopWorkers(url, ledger)
        accepted: list[str] = []
        refused: list[httpx.Response] = []
        try:
            workers.start("--ttl-s", "2")
            until(lambda: leases.neighbours(engine, host=host_name(), boot=boot_id()), 30)
            async with serve(tmp_path, url) as (client, _service):
                fill(folder / "ballast")
                while len(refused) < 3:
                    answer = await client.post("/v1/datasets", json=DATASET)
                    if answer.status_code == 202:
                        accepted.append(answer.json()["job"]["id"])
                    else:
                        refused.append(answer)
                    assert len(accepted) < 3000
                assert {answer.status_code for answer in refused} <= {503, 507}, refused[0].text
                assert all("retry-after" in answer.headers for answer in refused)
                assert (await client.get("/v1/jobs")).status_code == 200
                (folder / "ballast").unlink()
                answer = await client.post("/v1/datasets", json=DATASET)
                assert answer.status_code == 202
                accepted.append(answer.json()["job"]["id"])
            until_all_ended(engine)
        finally:
            workers.stop()
        assert set(check_invariants(engine, accepted)) == {"succeeded"}
        engine.dispose()


@pytest.mark.anyio
@POSTGRESQL_ONLY
async def test_a_server_that_became_a_standby_is_503_to_writers_and_answers_readers(
    database_url: str, engine: sa.Engine, tmp_path: Path
) -> None:
    name = sa.make_url(database_url).database
    async with serve(tmp_path, database_url) as (client, service):
        with engine.begin() as conn:
            conn.execute(sa.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        service.database.engine.dispose()  # a failover cuts every connection
        refused = await client.post("/v1/datasets", json=DATASET)
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/v1/jobs")).status_code == 200
        with engine.begin() as conn:
            conn.execute(sa.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
        service.database.engine.dispose()
        assert (await client.post("/v1/datasets", json=DATASET)).status_code == 202


# A network that swallows everything


@POSTGRESQL_ONLY
def test_no_call_waits_longer_than_ten_seconds_for_a_network_that_swallows_everything(database_url: str) -> None:
    with Proxy(database_url) as proxy:
        engine = open_engine(proxy.url)
        leases.register(engine, worker_info("w1"))
        fresh = open_engine(proxy.url)
        rested = open_engine(proxy.url)
        with rested.connect():
            pass
        half = engine.connect()
        half.execute(sa.text("SELECT 1"))  # within a transaction
        committing = engine.connect()
        enqueue_in(committing)
        time.sleep(1.2)  # `rested` is asked whether it lives before it is used
        with engine.connect():
            pass
        listener = Listener(fresh)
        proxy.hold()
        calls: dict[str, Callable[[], object]] = {
            "a connection just used": lambda: leases.heartbeat(engine, "w1"),
            "a connection that rested": lambda: leases.heartbeat(rested, "w1"),
            "a new connection": lambda: leases.heartbeat(fresh, "w1"),
            "the middle of a transaction": lambda: half.execute(sa.text("SELECT 2")),
            "a commit": committing.commit,
        }
        took: dict[str, float] = {}
        errors: dict[str, Exception] = {}

        def run(name: str) -> None:
            start = time.monotonic()
            try:
                calls[name]()
            except OperationalError as error:
                errors[name] = error
            took[name] = time.monotonic() - start

        threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in calls]
        for thread in threads:
            thread.start()
        start = time.monotonic()
        listener.open()
        took["a listener"] = time.monotonic() - start
        assert listener.fileno() is None
        for thread in threads:
            thread.join(15)
        assert set(errors) == set(calls)
        assert max(took.values()) < 11
        proxy.resume()
        assert leases.heartbeat(engine, "w1").alive
        for connection in (half, committing):
            connection.close()
        for made in (engine, fresh, rested):
            made.dispose()


def enqueue_in(conn: sa.Connection) -> str:
    return queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_x", source="nothing"))


@POSTGRESQL_ONLY
def test_a_result_waits_for_the_network_while_its_lease_holds(world: World, database_url: str) -> None:
    feed = world.feed()
    with Proxy(database_url) as proxy:
        patient = {"ISTHMUS_DATABASE_URL": proxy.url, "ISTHMUS_WORKER_TTL_S": "60"}
        with world.worker(**patient):
            public_id = world.ingest(feed.source)
            world.until_it_reads(public_id)
            proxy.hold()
            feed.end()
            other = world.ingest("nowhere")
            world.until(lambda: "does not answer" in world.log(), 20)
            assert (world.row(public_id).state, world.row(other).state) == ("running", "queued")
            proxy.resume(deliver=False)
            row = world.until_state(public_id, "succeeded", "failed")
            assert (row.state, row.lease_epoch) == ("succeeded", 1)
            world.until_state(other, "failed")


@POSTGRESQL_ONLY
def test_a_result_that_comes_after_its_lease_is_discarded(world: World, database_url: str) -> None:
    feed = world.feed()
    with Proxy(database_url) as proxy, world.worker(ISTHMUS_DATABASE_URL=proxy.url):
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        proxy.hold()
        with world.worker():
            world.until_it_reads(public_id, attempt=2)
            feed.end()  # for both
            row = world.until_state(public_id, "succeeded", "failed")
            assert (row.state, row.lease_epoch) == ("succeeded", 2)
            # What was on its way arrives late.
            proxy.resume()
            world.until(lambda: "declared dead" in world.log(0), 20)
            world.until(lambda: len(world.rows(worker)) == 2)
        (result,) = world.rows(job_result)
        assert result.epoch == 2
        assert Counter(event.type for event in world.rows(job_event))["succeeded"] == 1


# Hints


@contextmanager
def _starts_within(world: World, seconds: float) -> Generator[None]:
    yield
    public_id = world.ingest("nowhere")
    world.until(lambda: world.row(public_id).attempt == 1, seconds)


LISTENERS: Final = sa.text(
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'"
)


@POSTGRESQL_ONLY
def test_jobs_start_within_the_poll_interval_when_hints_are_lost_and_a_cut_listener_comes_back(
    world: World, database_url: str
) -> None:
    def listeners() -> list[int]:
        with world.engine.connect() as conn:
            return list(conn.execute(LISTENERS).scalars())

    with Proxy(database_url) as proxy, world.worker(ISTHMUS_DATABASE_URL=proxy.url, ISTHMUS_TICK_S="1"):
        (first,) = world.until(listeners, 30)
        world.until(lambda: world.rows(worker))
        with _starts_within(world, 10), world.engine.connect() as conn:
            conn.execute(sa.text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": first})
        # It is opened again, a moment later if the server is away.
        (second,) = world.until(listeners, 10)
        assert second != first
        with _starts_within(world, 10):
            proxy.lose(lambda message: message.direction == "answer" and message.body[:1] == b"A")
        with _starts_within(world, 10):
            proxy.lose(lambda _: False)


# A server that is busy


@pytest.mark.anyio
@POSTGRESQL_ONLY
@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_a_transaction_that_the_server_refuses_is_run_again_a_few_times_and_then_503(
    database_url: str, engine: sa.Engine, tmp_path: Path, code: str
) -> None:
    _refuse_writes(engine, code)
    async with serve(tmp_path, database_url) as (client, _service):
        _refusals(engine, 3)
        accepted = await client.post("/v1/datasets", json=DATASET)
        assert accepted.status_code == 202, accepted.text
        _refusals(engine, 1000)
        refused = await client.post("/v1/datasets", json=DATASET)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        with engine.connect() as conn:
            assert conn.execute(sa.text("SELECT last_value FROM refusals")).scalar_one() == 1000 - 5
        _refusals(engine, 0)
        assert (await client.post("/v1/datasets", json=DATASET)).status_code == 202
    with engine.connect() as conn:
        assert conn.execute(sa.select(sa.func.count()).select_from(job)).scalar_one() == 2


def _refuse_writes(engine: sa.Engine, code: str) -> None:
    """Let the server refuse to add jobs as often as a sequence says: a sequence is not rolled back."""
    with engine.begin() as conn:
        conn.execute(sa.text("CREATE SEQUENCE refusals MINVALUE -1000000 MAXVALUE 1000000 INCREMENT -1 START -1"))
        conn.execute(
            sa.text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                "IF nextval('refusals') >= 0 THEN "
                f"RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$"
            )
        )
        conn.execute(sa.text("CREATE TRIGGER refuse BEFORE INSERT ON job FOR EACH ROW EXECUTE FUNCTION refuse()"))


def _refusals(engine: sa.Engine, num: int) -> None:
    with engine.begin() as conn:
        conn.execute(sa.text("SELECT setval('refusals', :num)"), {"num": num})


@POSTGRESQL_ONLY
def test_two_transactions_that_lock_each_other_out_both_end(engine: sa.Engine) -> None:
    from service.contract.transact import transact

    ids = [enqueue(engine), enqueue(engine)]
    met = threading.Barrier(2)
    runs: list[int] = []

    def work(number: int) -> None:
        tries = 0

        def both(conn: sa.Connection) -> None:
            nonlocal tries
            tries += 1
            for public_id in ids if number == 0 else reversed(ids):
                conn.execute(sa.update(job).where(job.c.public_id == public_id).values(name=str(number)))
                if tries == 1 and public_id == ids[number]:
                    met.wait(10)

        transact(engine, both)
        runs.append(tries)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(runs) == [1, 2]


@pytest.mark.anyio
@POSTGRESQL_ONLY
async def test_a_pool_without_a_free_connection_is_503_and_the_heartbeat_goes_on(
    database_url: str, engine: sa.Engine, tmp_path: Path
) -> None:
    leases.register(engine, worker_info("w1"))
    heart = Heartbeat(database_url, 0.1)
    heart.beat_for("w1")
    async with serve(tmp_path, database_url) as (client, service):
        pool: Any = service.database.engine.pool
        held = [service.database.engine.connect() for _ in range(pool.size() + pool._max_overflow)]
        start = time.monotonic()
        refused = await client.post("/v1/datasets", json=DATASET)
        took_s = time.monotonic() - start
        assert refused.status_code == 503, refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert took_s < 10
        assert heart.well_for_s() >= took_s
        for connection in held:
            connection.close()
        assert (await client.post("/v1/datasets", json=DATASET)).status_code == 202
    heart.stop()


@pytest.mark.anyio
@POSTGRESQL_ONLY
async def test_a_locked_table_is_503_within_the_time_limits_and_the_heartbeat_goes_on(
    database_url: str, engine: sa.Engine, tmp_path: Path
) -> None:
    leases.register(engine, worker_info("w1"))
    heart = Heartbeat(database_url, 0.1)
    heart.beat_for("w1")
    async with serve(tmp_path, database_url) as (client, _service):
        with engine.begin() as conn:
            conn.execute(sa.text("LOCK TABLE job IN ACCESS EXCLUSIVE MODE"))
            start = time.monotonic()
            refused = await client.get("/v1/jobs", timeout=60)
            took_s = time.monotonic() - start
        assert refused.status_code == 503, refused.text
        assert took_s < 15
        assert heart.well_for_s() >= took_s
        assert (await client.get("/v1/jobs")).status_code == 200
    heart.stop()
