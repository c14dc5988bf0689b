"""Run a unit of work in one transaction, again when the database asked for that."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable
from typing import Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

Result = TypeVar("Result")

_ATTEMPTS: Final = 5
# serialization_failure, deadlock_detected, lock_not_available: the transaction was rolled back, so nothing happened.
_AGAIN: Final = frozenset({"40001", "40P01", "55P03"})


def transact(engine: sa.Engine, work: Callable[[sa.Connection], Result], *, single: bool = False) -> Result:
    """Run `work` in a transaction of its own, up to five times after a serialization failure, deadlock or busy lock.

    `work` must not have effects outside the transaction. With `single` it is one statement on PostgreSQL, which is
    atomic without BEGIN and COMMIT around it: one round trip instead of three. A lost connection is not tried again,
    since the commit may have happened. Raises what the database raised last.
    """

    def run() -> Result:
        with engine.connect().execution_options(single=single) as connection, connection.begin():
            return work(connection)

    return again(run)


def again(run: Callable[[], Result]) -> Result:
    """Run a unit of work, up to five times after a serialization failure, deadlock or busy lock."""
    for attempt in range(_ATTEMPTS):
        try:
            return run()
        except DBAPIError as error:
            if attempt + 1 == _ATTEMPTS or not _may_run_again(error):
                raise
        time.sleep(random.random() * 0.02 * 2**attempt)
    raise AssertionError


def read(engine: sa.Engine, work: Callable[[sa.Connection], Result], *, single: bool = False) -> Result:
    """Run `work`, which only reads, in a transaction that takes no write lock on SQLite; `single` as in `transact`."""
    with engine.connect().execution_options(sqlite_read=True, single=single) as connection, connection.begin():
        return work(connection)


def _may_run_again(error: DBAPIError) -> bool:
    original = error.orig
    if isinstance(original, sqlite3.OperationalError):
        return (original.sqlite_errorcode & 0xFF) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    return getattr(original, "sqlstate", None) in _AGAIN
