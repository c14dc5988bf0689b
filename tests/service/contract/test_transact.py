from __future__ import annotations

import sqlite3

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from service.contract import completion, leases, outcomes, picking, queue
from service.contract.transact import read, transact

BUSY = "database is locked"


def _busy(statement: str = "work") -> OperationalError:
    original = sqlite3.OperationalError(BUSY)
    original.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return OperationalError(statement, {}, original)


def test_work_is_run_again_when_the_database_was_busy(engine: sa.Engine) -> None:
    calls: list[int] = []

    def work(conn: sa.Connection) -> str:
        calls.append(1)
        if len(calls) < 3:
            raise _busy()
        return "done"

    assert transact(engine, work) == "done"
    assert len(calls) == 3


def test_work_is_not_run_for_ever(engine: sa.Engine) -> None:
    calls: list[int] = []

    def work(conn: sa.Connection) -> None:
        calls.append(1)
        raise _busy()

    with pytest.raises(OperationalError):
        transact(engine, work)
    assert len(calls) == 5


def test_other_failures_are_not_tried_again(engine: sa.Engine) -> None:
    calls: list[int] = []

    def work(conn: sa.Connection) -> None:
        calls.append(1)
        conn.execute(sa.text("SELECT nothing FROM nowhere"))

    with pytest.raises(DBAPIError):
        transact(engine, work)
    assert len(calls) == 1


def test_a_deadlock_is_tried_again(engine: sa.Engine) -> None:
    if engine.dialect.name != "postgresql":
        pytest.skip("SQLite has one writer")
    calls: list[int] = []

    def work(conn: sa.Connection) -> None:
        calls.append(1)
        if len(calls) == 1:
            conn.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40P01'; END $$"))

    transact(engine, work)
    assert len(calls) == 2


def test_reading_takes_no_write_lock(engine: sa.Engine) -> None:
    with engine.begin() as writer:
        writer.execute(sa.text("DELETE FROM tenant_queue"))
        assert read(engine, lambda conn: conn.scalar(sa.text("SELECT count(*) FROM job"))) == 0


def test_a_statement_built_once_is_compiled_once() -> None:
    of_leases = (
        picking._CLAIM[False, False],
        picking._CLAIM_NOTED[True, True],
        leases._PROMOTE,
        leases._ORPHANS,
        leases._HEARTBEAT,
    )
    for statement in (*of_leases, completion._SUCCEED_TOGETHER, outcomes._LATER, queue._CHARGE, queue._CANCEL):
        assert statement._generate_cache_key() is not None, statement
