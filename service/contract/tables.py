"""The rows: SQLAlchemy tables, the same for SQLite and PostgreSQL, and the engines to reach them.

`migrations/` creates what stands here and a test compares the two. `queue.py` is the only writer of `job` and of the
tables that hang on it. Every table carries `tenant_id`, and every select of a tenant's rows goes through `owned`.

Times are `timestamptz` on PostgreSQL and whole microseconds on SQLite (`Instant`); the database's clock decides
(`now()`, `after(seconds)`), because workers' clocks disagree.
"""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    SmallInteger,
    String,
    Table,
    Text,
    event,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import JSON, TypeDecorator

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

STATES: Final = ("scheduled", "queued", "running", "succeeded", "failed", "cancelled")
MAX_ARGS_BYTES: Final = 65_536


class Instant(TypeDecorator[datetime]):
    """A point in time: timestamptz on PostgreSQL, integer microseconds on SQLite; always aware, always UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Choose the column type."""
        return dialect.type_descriptor(BigInteger() if dialect.name == "sqlite" else sa.DateTime(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        """Write an aware datetime."""
        if value is None or dialect.name != "sqlite":
            return value
        return round(value.timestamp() * 1_000_000)

    def process_result_value(self, value: Any | None, dialect: sa.Dialect) -> datetime | None:
        """Read an aware datetime."""
        if value is None or dialect.name != "sqlite":
            return value
        return datetime.fromtimestamp(value / 1_000_000, UTC)


class now(FunctionElement[datetime]):  # noqa: N801  # reads as the SQL function it is
    """The database's clock at the start of the statement.

    So it moves within a transaction, and an index can be searched for it, as it cannot for `clock_timestamp()`.
    """

    type = Instant()
    inherit_cache = True


class after(FunctionElement[datetime]):  # noqa: N801
    """The database's clock plus a number of seconds (a bind parameter or an expression; may be negative)."""

    type = Instant()
    inherit_cache = True  # a function of its clauses, so that a statement built once is compiled once

    def __init__(self, seconds: ColumnElement[Any]) -> None:
        super().__init__(seconds)


@compiles(now)
def _now(_element: now, _compiler: Any, **_: Any) -> str:
    return "statement_timestamp()"


@compiles(now, "sqlite")
def _now_sqlite(_element: now, _compiler: Any, **_: Any) -> str:
    return "isthmus_now()"


@compiles(after)
def _after(element: after, compiler: Any, **options: Any) -> str:
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **options)}))"


@compiles(after, "sqlite")
def _after_sqlite(element: after, compiler: Any, **options: Any) -> str:
    return f"(isthmus_now() + CAST(({compiler.process(element.clauses, **options)}) * 1000000 AS INTEGER))"


# None is SQL's NULL, never JSON's null.
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
_Big = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's rowid alias must be spelled INTEGER


def _created() -> Column[datetime]:
    return Column("created_at", Instant, nullable=False, default=now())


def _partial(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    # A literal predicate: PostgreSQL's generic plans cannot use a partial index for a bound parameter.
    predicate = sa.text(where)
    return Index(name, *columns, unique=unique, postgresql_where=predicate, sqlite_where=predicate)


worker = Table(
    "worker",
    metadata,
    Column("id", String(64), primary_key=True, comment="one row per process start, never per host name"),
    Column("lanes", Json, nullable=False),
    Column("kinds", Json, nullable=False, comment="job kinds that this version runs"),
    Column("host", Text, nullable=False),
    Column(
        "boot", Text, nullable=False, comment="id of the host's boot: a unix endpoint is used on the same boot only"
    ),
    Column("pid", Integer, nullable=False),
    Column("endpoint", Text, comment="unix:/path or http://host:port of the inference process"),
    Column("device", Text),
    Column("version", Text, nullable=False),
    Column("draining", Boolean, nullable=False, default=False),
    Column("started_at", Instant, nullable=False, default=now()),
    Column("last_seen", Instant, nullable=False, default=now()),  # not indexed: heartbeats stay HOT updates
    postgresql_with={"fillfactor": 50},
)

job = Table(
    "job",
    metadata,
    Column("id", _Big, primary_key=True, autoincrement=True),
    Column("public_id", String(64), nullable=False, unique=True),
    Column("tenant_id", String(64), nullable=False),
    Column("lane", String(16), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("name", Text),
    Column("state", String(16), nullable=False, default="queued"),
    Column("priority", SmallInteger, nullable=False, default=5),
    Column("fair_seq", BigInteger, nullable=False, comment="virtual start time (start-time fair queueing)"),
    Column("run_at", Instant, nullable=False, default=now()),
    Column("attempt", SmallInteger, nullable=False, default=0),
    Column("max_attempts", SmallInteger, nullable=False, default=5),
    Column("lease_epoch", BigInteger, nullable=False, default=0, comment="fencing number: +1 per claim, never reset"),
    Column("worker_id", String(64), comment="no foreign key: the worker row may vanish first"),
    Column("deadline_s", Integer, nullable=False),
    Column("started_at", Instant),
    Column("deadline_at", Instant),
    Column("finished_at", Instant),
    Column("cancel_requested_at", Instant),
    Column("args", Json, nullable=False),
    Column("meta", Json, comment="the caller's own metadata"),
    Column("error", Json, comment="the last one; the history is in job_event"),
    Column("unique_key", Text),
    _created(),
    CheckConstraint("state IN ('scheduled','queued','running','succeeded','failed','cancelled')", name="state"),
    CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
    CheckConstraint("(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="leased"),
    _partial("job_claim", "lane", "priority", "fair_seq", "id", where="state = 'queued'"),
    _partial("job_due", "run_at", where="state = 'scheduled'"),
    _partial("job_running", "worker_id", where="state = 'running'"),
    _partial("job_deadline", "deadline_at", where="state = 'running'"),
    _partial("job_prune", "finished_at", where="finished_at IS NOT NULL"),
    _partial(
        "job_unique",
        "tenant_id",
        "kind",
        "unique_key",
        where="unique_key IS NOT NULL AND state IN ('scheduled','queued','running')",
        unique=True,
    ),
    Index("job_tenant", "tenant_id", "id"),
    sqlite_autoincrement=True,
    postgresql_with={
        "fillfactor": 80,
        "autovacuum_vacuum_scale_factor": 0.01,
        "autovacuum_vacuum_threshold": 500,
        "autovacuum_vacuum_cost_delay": 0,
        "autovacuum_analyze_scale_factor": 0.05,
    },
)


def _job_id(*, primary_key: bool = False) -> Column[int]:
    return Column(
        "job_id",
        _Big,
        ForeignKey("job.id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
        autoincrement=False,
    )


job_result = Table(
    "job_result",
    metadata,
    _job_id(primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("body", Json, nullable=False),
    _created(),
)

job_progress = Table(
    "job_progress",
    metadata,
    _job_id(primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("done", BigInteger, nullable=False),
    Column("total", BigInteger),
    Column("eta_s", sa.Float),
    Column("updated_at", Instant, nullable=False, default=now()),
    postgresql_with={"fillfactor": 50},
)

job_event = Table(
    "job_event",
    metadata,
    Column("id", _Big, primary_key=True, autoincrement=True),
    _job_id(),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("at", Instant, nullable=False, default=now()),
    Column("type", String(32), nullable=False),
    Column("detail", Json, nullable=False),
    Index("job_event_job", "job_id", "id"),
    sqlite_autoincrement=True,
)

metric = Table(
    "metric",
    metadata,
    _job_id(primary_key=True),
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    Column("name", String(128), primary_key=True, comment="loss/a+b takes two modality names"),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant_id", String(64), nullable=False),
    Column("value", sa.Double, nullable=False),
)

job_input = Table(
    "job_input",
    metadata,
    _job_id(primary_key=True),
    Column(
        "ref",
        String(64),
        primary_key=True,
        comment="id of the data set, model, or job (for its checkpoint) that is read",
    ),
    Column("tenant_id", String(64), nullable=False),
    Index("job_input_ref", "ref"),
)

checkpoint = Table(
    "checkpoint",
    metadata,
    _job_id(primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("tenant_id", String(64), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("artifact", Text, nullable=False, comment="of the checkpoint, whose model/ is a model"),
    Column("digest", String(64), nullable=False),
    Column("metrics", Json, nullable=False),
    _created(),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("status", SmallInteger, comment="null while the first request is in progress"),
    Column("body", Json),
    _created(),
    Index("idempotency_created", "created_at"),
)

tenant_queue = Table(
    "tenant_queue",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("lane", String(16), primary_key=True),
    Column("vtime", BigInteger, nullable=False, default=0),
    Column("weight", Integer, nullable=False, default=1),
    Column("max_running", Integer),
    Column("max_queued", Integer),
    Index("tenant_queue_vtime", "lane", "vtime"),
)

dataset = Table(
    "dataset",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("state", String(16), nullable=False, default="ingesting", comment="ingesting, ready, failed"),
    Column("artifact", Text),
    Column("digest", String(64)),
    Column("info", Json, comment="the IngestResult"),
    Column("meta", Json),
    Column("job_id", String(64), comment="public id of the ingest job"),
    Column("deleted_at", Instant),
    _created(),
    Index("dataset_tenant", "tenant_id", "created_at"),
)

model = Table(
    "model",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("artifact", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("info", Json, nullable=False, comment="the TrainResult"),
    Column("job_id", String(64), comment="public id of the job that made it"),
    Column("deleted_at", Instant),
    _created(),
    Index("model_tenant", "tenant_id", "created_at"),
)

alias = Table(
    "alias",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("model_id", String(64), ForeignKey("model.id", ondelete="CASCADE"), nullable=False),
    Index("alias_model", "model_id"),
)

embedding_set = Table(
    "embedding_set",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("artifact", Text, nullable=False),
    Column("info", Json, nullable=False, comment="the EmbedResult"),
    Column("job_id", String(64), nullable=False),
    Column("deleted_at", Instant),
    _created(),
    Index("embedding_set_tenant", "tenant_id", "created_at"),
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column(
        "hash", String(64), nullable=False, unique=True, comment="SHA-256 of 256 random bits; the key is shown once"
    ),
    Column("scopes", Json, nullable=False),
    Column("requests_per_minute", Integer),
    Column("expires_at", Instant),
    Column("revoked_at", Instant),
    Column("last_used_at", Instant),
    _created(),
)


def owned(table: Table, tenant: str) -> sa.Select[Any]:
    """Select a tenant's rows of a table, without those that were deleted.

    Every read of the API starts here, so a foreign id is answered like an unknown one.
    """
    query = sa.select(table).where(table.c.tenant_id == tenant)
    return query.where(table.c.deleted_at.is_(None)) if "deleted_at" in table.c else query


def open_engine(url: str, *, pool_size: int = 5) -> sa.Engine:
    """Open an engine with the time-outs and pragmas that the queue relies on.

    On SQLite every transaction that `engine.begin()` opens is BEGIN IMMEDIATE: one that read first and wrote later
    would meet SQLITE_BUSY at once, whatever the busy time-out.
    """
    if url.startswith("sqlite"):
        engine = sa.create_engine(url, pool_size=pool_size, connect_args={"timeout": 10, "check_same_thread": False})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
        return engine
    options = "-c statement_timeout=10000 -c lock_timeout=2000 -c idle_in_transaction_session_timeout=15000"
    return sa.create_engine(
        url,
        pool_size=pool_size,
        pool_pre_ping=True,
        pool_timeout=5,
        connect_args={"connect_timeout": 5, "options": options, "keepalives_idle": 30, "prepare_threshold": None},
    )


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver would otherwise begin transactions behind our back
    # "Deterministic" makes it constant within one statement, as statement_timestamp() is.
    connection.create_function("isthmus_now", 0, lambda: time.time_ns() // 1000, deterministic=True)
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
        "journal_size_limit=67108864",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: sa.Connection) -> None:
    # Reads ask for execution_options(sqlite_read=True) and take no write lock.
    mode = "DEFERRED" if connection.get_execution_options().get("sqlite_read") else "IMMEDIATE"
    connection.exec_driver_sql(f"BEGIN {mode}")
