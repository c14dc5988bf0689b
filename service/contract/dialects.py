"""What differs between SQLite and PostgreSQL: points in time, the clock, JSON, and how an engine is opened.

Times are `timestamptz` on PostgreSQL and whole microseconds on SQLite (`Instant`); the database's clock decides
(`now()`, `after(seconds)`), because workers' clocks disagree.
"""

from __future__ import annotations

import math
import sqlite3
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import psycopg
import sqlalchemy as sa
from sqlalchemy import BigInteger, Integer, event
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import JSON, TypeDecorator

from service.contract.committed import Committed
from service.contract.deadline import TimedConnection
from service.contract.host import network_file_system

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

# How a connection to PostgreSQL is opened, and how one that is idle learns that the other end is gone: in a minute.
LINK: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}

_PING_S: Final = 5.0  # with the time to connect anew it is as long as any answer may take
_SAFE_SQLITE: Final = (3, 51, 3)
_IDLE_S: Final = 1.0  # a connection that was just used is still there


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
Big = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's rowid alias must be spelled INTEGER


def storable(value: Any) -> Any:
    """Replace what a JSON column cannot hold: NUL and lone surrogates in strings, numbers that are not finite."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\x00", "\ufffd")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
        return {storable(str(key)): storable(item) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in cast("list[Any]", value)]
    return value


def open_engine(url: str, *, pool_size: int = 5, answer_s: float = 10.0) -> sa.Engine:
    """Open an engine with the time-outs and pragmas that the queue relies on.

    PostgreSQL gives up a statement after 8 s, and the client gives up a server that says nothing for `answer_s`. A URL
    with `prepare_threshold=none` prepares no statement, as an old pooler in transaction mode needs it. On SQLite every
    transaction that `engine.begin()` opens is BEGIN IMMEDIATE: one that read first and wrote later would meet
    SQLITE_BUSY at once, whatever the busy time-out.
    """
    if url.startswith("sqlite"):
        how = {"timeout": 10, "check_same_thread": False, "factory": Committed}
        engine = sa.create_engine(url, pool_size=pool_size, connect_args=how)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_immediate)
        return engine
    options = "-c statement_timeout=8000 -c lock_timeout=2000 -c idle_in_transaction_session_timeout=15000"
    parsed = sa.make_url(url)
    # Otherwise those that ask for it are prepared, and no others.
    threshold = None if parsed.query.get("prepare_threshold") == "none" else sys.maxsize
    engine = sa.create_engine(
        parsed.difference_update_query(["prepare_threshold"]),
        pool_size=pool_size,
        pool_timeout=5,
        # The driver would begin a transaction for every statement: `_begin` does, but for units of one statement.
        connect_args={"options": options, "prepare_threshold": threshold, "autocommit": True, **LINK},
    )
    event.listen(engine, "begin", _begin)
    event.listen(engine, "do_connect", partial(_connect_timed, answer_s))
    event.listen(engine, "checkin", _note_return)
    event.listen(engine, "checkout", partial(_check_out, engine.dialect))
    return engine


def risks(url: str) -> list[str]:
    """Say what is dangerous about a database, for the log of every process that starts on it."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database == ":memory:":
        return []
    found: list[str] = []
    if sqlite3.sqlite_version_info < _SAFE_SQLITE:
        found.append(
            f"SQLite {sqlite3.sqlite_version} may damage a file that two processes checkpoint: "
            "use 3.51.3 or later, or PostgreSQL"
        )
    if (kind := network_file_system(Path(parsed.database))) is not None:
        found.append(
            f"{parsed.database} lies on a network file system ({kind}), where SQLite's locks and its shared memory do "
            "not hold: the database WILL be damaged once two hosts open it. Put ISTHMUS_DATA on a local disk, or set "
            "ISTHMUS_DATABASE_URL to PostgreSQL"
        )
    return found


def _connect_timed(
    answer_s: float, _dialect: sa.Dialect, _record: object, args: list[Any], options: dict[str, Any]
) -> TimedConnection:
    connection = TimedConnection.connect(*args, **options)
    connection.answer_s = answer_s
    return connection


def _begin(connection: sa.Connection) -> None:
    options = connection.get_execution_options()
    if not options.get("single") and options.get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql("BEGIN")


def _note_return(_connection: object, record: ConnectionPoolEntry) -> None:
    record.info["returned_at"] = time.monotonic()


def _check_out(
    dialect: sa.Dialect, connection: DBAPIConnection, record: ConnectionPoolEntry, _proxy: PoolProxiedConnection
) -> None:
    driver = cast("TimedConnection", connection)
    try:
        # As `pool_pre_ping`, which costs a busy worker a round trip for every transaction.
        if time.monotonic() - record.info.get("returned_at", math.inf) > _IDLE_S:
            with driver.answering_within(_PING_S):
                dialect.do_ping(connection)
        # Whoever asked for an isolation level left the driver beginning transactions that nobody would commit.
        if not driver.autocommit:
            driver.autocommit = True
    except psycopg.Error as error:
        raise InvalidatePoolError from error


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
