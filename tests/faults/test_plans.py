"""A long history, and a long wait, cost the queue nothing: every statement of it finds its rows by an index.

The statements are those that the functions send: they are recorded on their way to the database and then explained, on
PostgreSQL by a generic plan, which is what a prepared statement ends up with.
"""

from __future__ import annotations

import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql
from sqlalchemy import event

from service.app import create_app
from service.contract import leases, outcomes, queue
from service.contract.dialects import open_engine
from service.contract.jobs import KINDS, IngestArgs, IngestResult
from service.contract.leases import Claim, WorkerInfo
from service.contract.settings import Settings
from service.contract.tables import metadata, tenant_queue

ME: Final = "w_me"
TTL_S: Final = 1e9
WAITING: Final = 50_000
HISTORY: Final = ("job", "job_result", "job_progress", "job_event", "job_input", "metric", "checkpoint")
# Partial indexes of what waits or runs: to walk one from its start is to look at what there is to do.
HOT: Final = frozenset({"job_claim", "job_fair", "job_due", "job_running", "job_deadline"})
SAME: Final = {  # what SQLite calls the indexes behind a table's own keys
    "sqlite_autoindex_job_1": "uq_job_public_id",
    "sqlite_autoindex_metric_1": "pk_metric",
    "sqlite_autoindex_checkpoint_1": "pk_checkpoint",
    "sqlite_autoindex_job_input_1": "pk_job_input",
}


@dataclass(frozen=True)
class Access:
    """How a plan reaches a table's rows."""

    table: str
    index: str | None
    searched: bool
    """Whether the index is entered at a key rather than walked from its start."""

    def is_cheap(self, *, in_order: bool) -> bool:
        """Tell whether the history's length does not matter; a page of a list may walk an index that has its order."""
        return self.table not in HISTORY or self.searched or self.index in HOT or (in_order and self.index is not None)


@dataclass(frozen=True)
class Plan:
    statement: str
    text: str
    accesses: list[Access]
    sorts: bool


def _note(sent: dict[str, Any], statement: str, parameters: Any) -> None:
    if re.match(r"SELECT (?!pg_catalog)|INSERT|UPDATE|DELETE|WITH", statement):
        sent[statement] = parameters


class _Recorder(psycopg.Cursor[Any]):
    """The driver's cursor, which also writes down what it is given: some statements are sent past SQLAlchemy."""

    sent: dict[str, Any] | None = None

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        if _Recorder.sent is not None:
            _note(_Recorder.sent, query.decode() if isinstance(query, bytes) else str(query), params)
        return super().execute(query, params, **options)

    def executemany(self, query: Any, params_seq: Any, **options: Any) -> Any:
        if _Recorder.sent is not None:
            _note(_Recorder.sent, query.decode() if isinstance(query, bytes) else str(query), next(iter(params_seq)))
        return super().executemany(query, params_seq, **options)


def _record(connection: Any, _record: object) -> None:
    if isinstance(connection, psycopg.Connection):
        connection.cursor_factory = _Recorder


@dataclass
class Full:
    """A database with a long history and a long wait."""

    engine: sa.Engine
    num: int

    def plans_of(self, act: Callable[[], object], *, generic: bool) -> list[Plan]:
        """Let something happen and explain every statement that it sent."""
        with self.recorded() as sent:
            act()
        return [self.explain(statement, found, generic=generic) for statement, found in sent.items()]

    @contextmanager
    def recorded(self) -> Generator[dict[str, Any]]:
        """Yield the statements that are sent meanwhile, each with the parameters of its last time."""
        sent: dict[str, Any] = {}

        def note(_conn: object, _cursor: object, statement: str, parameters: Any, _context: object, many: bool) -> None:
            _note(sent, statement, parameters[0] if many else parameters)

        if self.engine.dialect.name == "sqlite":
            event.listen(sa.Engine, "before_cursor_execute", note)
        _Recorder.sent = sent
        try:
            yield sent
        finally:
            _Recorder.sent = None
            if self.engine.dialect.name == "sqlite":
                event.remove(sa.Engine, "before_cursor_execute", note)

    def explain(self, statement: str, parameters: Any, *, generic: bool) -> Plan:
        with self.engine.connect() as conn:
            if conn.dialect.name == "sqlite":
                lines = [row[-1] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
                return Plan(statement, "\n".join(lines), _read_sqlite(lines), any("ORDER BY" in line for line in lines))
            names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
            prepared = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", statement)
            driver = conn.connection.driver_connection
            assert driver is not None
            values = sql.SQL(", ").join(sql.Literal(parameters[name]) for name in names).as_string(driver)
            with driver.cursor() as cursor:
                cursor.execute(f"SET plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
                cursor.execute(f"PREPARE it AS {prepared.replace('%%', '%')}".encode())
                execute = f"EXECUTE it ({values})" if names else "EXECUTE it"
                cursor.execute(f"EXPLAIN (FORMAT JSON) {execute}".encode())
                (document,) = cursor.fetchone()[0]
                cursor.execute("DEALLOCATE it")
                cursor.execute("RESET plan_cache_mode")
            nodes = list(_nodes(document["Plan"]))
            text = "\n".join(" ".join(f"{key}={node[key]}" for key in _SHOWN if key in node) for node in nodes)
            return Plan(statement, text, _read_postgres(nodes), _sorts(nodes))


_SHOWN: Final = ("Node Type", "Relation Name", "Index Name", "Index Cond", "Filter", "Plan Rows")


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(
            {"Relation Name": node.get("Relation Name"), **child} if "Bitmap" in child["Node Type"] else child
        )


def _sorts(nodes: list[dict[str, Any]]) -> bool:
    """Tell whether jobs are put in order by more than an index; the few that were claimed may be."""
    sorted_by_hand = [
        child
        for node in nodes
        if node["Node Type"] == "Sort"
        for child in node["Plans"]
        if child["Parent Relationship"] != "InitPlan"  # a common table expression is listed under the topmost node
    ]
    return any(below.get("Relation Name") == "job" for child in sorted_by_hand for below in _nodes(child))


def _read_postgres(nodes: list[dict[str, Any]]) -> list[Access]:
    found: list[Access] = []
    for node in nodes:
        if node["Node Type"] in ("Seq Scan", "Sample Scan"):
            found.append(Access(node["Relation Name"], None, searched=False))
        elif "Index Name" in node:
            found.append(Access(node["Relation Name"] or "", node["Index Name"], searched="Index Cond" in node))
    return found


_STEP: Final = re.compile(
    r"(?P<how>SCAN|SEARCH) (?P<table>\w+)"
    r"(?: USING (?:COVERING )?(?:INDEX (?P<index>\w+)|(?P<key>INTEGER PRIMARY KEY)))?"
)
_ALIASES: Final = {"other": "job", "reader": "job"}


def _read_sqlite(lines: list[str]) -> list[Access]:
    found: list[Access] = []
    for line in lines:
        if step := _STEP.match(line):
            table = _ALIASES.get(step["table"], step["table"])
            index = f"pk_{table}" if step["key"] else SAME.get(step["index"] or "", step["index"])
            assert "AUTOMATIC" not in line, line
            found.append(Access(table, index, searched=step["how"] == "SEARCH"))
    return found


def _fill(engine: sa.Engine, num: int) -> None:
    """Write `num` finished jobs, half as many for later, and some that wait and run, with what hangs on them."""
    args = IngestArgs(dataset="ds_x", source="s").model_dump_json()
    sqlite = engine.dialect.name == "sqlite"
    instant = "isthmus_now() + ({}) * 1000000" if sqlite else "statement_timestamp() + ({}) * interval '1 second'"
    states = f"""CASE WHEN n <= {num} THEN CASE n % 3 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END
        WHEN n <= {num * 3 // 2} THEN 'scheduled' WHEN n <= {num * 3 // 2 + WAITING} THEN 'queued' ELSE 'running' END"""
    job_rows = f"""
        INSERT INTO job (public_id, tenant_id, lane, kind, name, state, priority, fair_seq, run_at, attempt,
            max_attempts, lease_epoch, worker_id, deadline_s, finished_at, started_at, deadline_at, args,
            unique_key, created_at)
        SELECT 'job_' || n, CASE WHEN n % 25 = 0 THEN 'default' ELSE 't' || (n % 4) END, 'bulk', 'ingest',
            'n' || (n % 100), state, n % 10, n * 1000,
            {instant.format("CASE WHEN state = 'scheduled' THEN 86400 + n ELSE -n END")}, 1, 5, 1,
            CASE WHEN state = 'running' THEN '{ME}' END, 86400,
            CASE WHEN n <= {num} THEN {instant.format(f"n - {2 * num}")} END,
            {instant.format(f"n - {2 * num}")},
            CASE WHEN state = 'running' THEN {instant.format("86400")} END,
            '{args}', CASE WHEN n % 2 = 0 THEN 'key ' || n END, {instant.format(f"n - {2 * num}")}
        FROM (SELECT n, {states} AS state FROM series) AS rows"""
    series = "WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series WHERE n < {})"
    last = num * 3 // 2 + WAITING + 40
    with engine.begin() as conn:
        if not sqlite:
            conn.exec_driver_sql("SET session_replication_role = replica")  # what hangs on a job is known to have one
        for statement in (
            f"{series.format(last)} {job_rows}",
            """INSERT INTO job_result (job_id, tenant_id, epoch, body, created_at)
                SELECT id, tenant_id, 1, '{}', created_at FROM job WHERE state = 'succeeded' AND id % 5 = 0""",
            """INSERT INTO job_progress (job_id, tenant_id, epoch, done, updated_at)
                SELECT id, tenant_id, 1, 1, created_at FROM job WHERE state = 'succeeded' AND id % 5 = 0""",
            """INSERT INTO job_event (job_id, tenant_id, epoch, at, type, detail)
                SELECT id, tenant_id, 1, created_at, 'queued', '{}' FROM job WHERE id % 5 = 0""",
            f"""{series.format(1000)} INSERT INTO metric (job_id, epoch, name, step, tenant_id, value)
                SELECT id, 1, 'loss', n, tenant_id, 1.0 FROM job, series WHERE job.id <= 40""",
            """INSERT INTO checkpoint (job_id, step, tenant_id, epoch, artifact, digest, metrics, created_at)
                SELECT id, 1, tenant_id, 1, 'a', 'd', '{}', created_at FROM job WHERE id % 10 = 0""",
            """INSERT INTO job_input (job_id, ref, tenant_id)
                SELECT id, 'ds_' || (id % 1000), tenant_id FROM job WHERE id % 5 = 0""",
        ):
            text = statement if not sqlite else statement.replace("AS rows", "")
            conn.exec_driver_sql(text.replace("%", "%%") if not sqlite else text)
        conn.execute(sa.insert(tenant_queue).values([{"tenant_id": f"t{n}", "lane": "bulk"} for n in range(4)]))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        if not sqlite:
            conn.exec_driver_sql("VACUUM ANALYZE")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("plans") / "isthmus.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    with request.getfixturevalue("postgres").database("migrated") as url:
        yield url


@contextmanager
def _full(url: str, num: int) -> Generator[Full]:
    # This takes longer than the queue's own engine lets a statement take.
    filler = open_engine(url) if url.startswith("sqlite") else sa.create_engine(url)
    _fill(filler, num)
    filler.dispose()
    engine = open_engine(url)
    leases.register(engine, WorkerInfo(ME, ["bulk"], list(KINDS), "h", "b", 1, None, "cpu", "0"))
    yield Full(engine, num)
    engine.dispose()


@pytest.fixture(scope="module", autouse=True)
def _recorded() -> Iterator[None]:
    event.listen(sa.Pool, "connect", _record)  # of any pool: the API opens an engine of its own
    yield
    event.remove(sa.Pool, "connect", _record)


@pytest.fixture(scope="module")
def full(database: str) -> Iterator[Full]:
    """200,000 finished jobs, 100,000 scheduled ones, 50,000 that wait and 40 that run."""
    with _full(database, 200_000) as made:
        yield made


def _claim(full: Full, *, limit: int = 1, oldest: bool = False) -> list[Claim]:
    return leases.claim(full.engine, worker_id=ME, lane="bulk", kinds=KINDS, ttl_s=TTL_S, limit=limit, oldest=oldest)


def _enqueue(full: Full, tenant: str = "t0", **options: Any) -> str:
    with full.engine.begin() as conn:
        return queue.enqueue(conn, tenant=tenant, args=IngestArgs(dataset="ds_x", source="s"), **options)


def _finish(full: Full, claim: Claim) -> None:
    result = IngestResult(
        artifact="datasets/ds_x/1",
        num_samples=1,
        num_rejected=0,
        rejects=[],
        modalities={"text": "text"},
        splits={"train": 1},
        labels=[],
        statistics={},
        digest="d",
        num_bytes=1,
    )
    assert outcomes.finish(full.engine, claim, ME, result) == "succeeded"


def _ask(full: Full, method: str, path: str) -> None:
    """Ask the API, which runs here."""

    async def ask() -> None:
        folder = Path(full.engine.url.database or "").parent if full.engine.dialect.name == "sqlite" else None
        url = full.engine.url.render_as_string(hide_password=False)
        data = folder or Path("/nonexistent")
        app = create_app(Settings(data=data, database_url=url, store_url="memory://plans"))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
        ):
            response = await client.request(method, path)
            assert response.status_code == 200, response.text

    anyio.run(ask)


def _cancel_and_retry(full: Full) -> None:
    public_id = _enqueue(full)
    with full.engine.begin() as conn:
        queue.cancel(conn, "t0", public_id)
        queue.retry(conn, "t0", public_id)


ACTS: Final[dict[str, tuple[Callable[[Full], object], set[str]]]] = {
    "claim": (lambda full: _claim(full, limit=4), {"job_claim"}),
    "claim the oldest": (lambda full: _claim(full, oldest=True), {"job_fair"}),
    "promote": (lambda full: leases.promote(full.engine), {"job_due"}),
    "rescue": (lambda full: leases.rescue(full.engine, ttl_s=TTL_S), {"job_running"}),
    "forget": (lambda full: leases.forget(full.engine, ["nobody"]), {"job_running"}),
    "heartbeat": (lambda full: leases.heartbeat(full.engine, ME), set()),
    "leases": (lambda full: leases.leases(full.engine, ME), {"job_running"}),
    "finish": (lambda full: _finish(full, _claim(full)[0]), {"pk_job"}),
    "fail": (lambda full: outcomes.fail(full.engine, _claim(full)[0], ME, {}, retry=True), {"pk_job"}),
    "enqueue": (_enqueue, {"job_claim"}),
    "look a unique key up": (lambda full: _enqueue(full, "t2", unique_key=f"key {full.num + 2}"), {"job_unique"}),
    "cancel": (_cancel_and_retry, {"uq_job_public_id"}),
    "prune": (lambda full: queue.prune(full.engine, older_than_s=1e9), {"job_prune"}),
    "list": (lambda full: _ask(full, "GET", "/v1/jobs"), {"job_tenant|pk_job", "pk_job_result", "pk_job_progress"}),
    "list on": (lambda full: _ask(full, "GET", "/v1/jobs?after=job_150000&limit=100"), {"job_tenant|pk_job"}),
    "list by state": (
        lambda full: _ask(full, "GET", "/v1/jobs?status=running"),
        {"job_tenant|job_running|job_deadline"},
    ),
    "list by name": (lambda full: _ask(full, "GET", "/v1/jobs?name=n99&kind=ingest"), {"job_tenant|pk_job"}),
    "get": (lambda full: _ask(full, "GET", "/v1/jobs/job_25"), {"uq_job_public_id"}),
    "metrics of a job": (lambda full: _ask(full, "GET", "/v1/jobs/job_25/metrics"), {"pk_metric"}),
    "events of a job": (lambda full: _ask(full, "GET", "/v1/jobs/job_25/events"), {"job_event_job"}),
    "checkpoints of a job": (lambda full: _ask(full, "GET", "/v1/jobs/job_50/checkpoints"), {"pk_checkpoint"}),
}


@pytest.mark.parametrize("name", ACTS)
def test_no_statement_reads_the_history(full: Full, name: str) -> None:
    act, indexes = ACTS[name]
    is_list = name.startswith("list")  # which is put together for each request; all else is built once
    plans = full.plans_of(lambda: act(full), generic=not is_list)
    shown = "\n\n".join(f"{plan.statement}\n{plan.text}" for plan in plans)
    for plan in plans:
        assert all(access.is_cheap(in_order=is_list and not plan.sorts) for access in plan.accesses), shown
        assert not (plan.sorts and name.startswith("claim")), shown
    used = {access.index for plan in plans for access in plan.accesses}
    assert all(used & set(index.split("|")) for index in indexes), shown


def test_every_row_that_goes_with_a_job_is_found_by_an_index() -> None:
    for table in metadata.tables.values():
        leading = {next(iter(index.columns)).name for index in table.indexes}
        leading.add(next(iter(table.primary_key.columns)).name)
        assert {key.parent.name for key in table.foreign_keys} <= leading, table.name


def _claim_ms(full: Full, num: int) -> float:
    """Return the median of claims one at a time, milliseconds; each job is finished afterwards."""
    taken_s: list[float] = []
    for _ in range(num):
        began = time.perf_counter()
        (found,) = _claim(full)
        taken_s.append(time.perf_counter() - began)
        _finish(full, found)
    return statistics.median(taken_s) * 1000


def test_a_claim_beside_a_long_history_takes(full: Full, record_property: Callable[[str, object], None]) -> None:
    median_ms = _claim_ms(full, 200)
    record_property("claim_p50_ms", round(median_ms, 3))
    sys.stdout.write(f"\n{full.engine.dialect.name}: claim p50 {median_ms:.2f} ms beside {full.num:,} finished jobs\n")
    with full.engine.connect() as conn:
        results = conn.scalar(sa.text("SELECT count(*) FROM job_result WHERE body <> '{}'"))
    assert results >= 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_finished_jobs_change_no_plan(
    database_url: str, record_property: Callable[[str, object], None]
) -> None:
    with _full(database_url, 1_000_000) as full:
        for name in ACTS:
            test_no_statement_reads_the_history(full, name)
        median_ms = _claim_ms(full, 200)
        record_property("claim_p50_ms", round(median_ms, 3))
        sys.stdout.write(
            f"\n{full.engine.dialect.name}: claim p50 {median_ms:.2f} ms beside {full.num:,} finished jobs\n"
        )
