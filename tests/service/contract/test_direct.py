from __future__ import annotations

import threading
from collections.abc import Iterator

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError

from service.contract.dialects import open_engine
from service.contract.direct import Direct
from service.contract.tables import tenant_queue
from tests.conftest import Postgres

_ADD = (
    sa.insert(tenant_queue)
    .values(tenant_id=sa.bindparam("tenant"), lane="bulk", vtime=sa.bindparam("start") + 1, weight=1)
    .returning(tenant_queue.c.tenant_id, tenant_queue.c.vtime)
)


@pytest.fixture
def url(postgres: Postgres) -> Iterator[str]:
    with postgres.database("migrated") as url:
        yield url


def test_it_commits_and_returns_rows_like_the_statement_itself(url: str) -> None:
    engine = open_engine(url)
    assert Direct(_ADD)(engine, {"tenant": "a", "start": 4}) == [("a", 5)]
    with engine.connect() as conn:
        assert conn.execute(sa.select(tenant_queue.c.tenant_id)).scalars().all() == ["a"]
    engine.dispose()


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "REPEATABLE READ"])
def test_it_commits_on_a_connection_that_had_an_isolation_level_of_its_own(url: str, level: str) -> None:
    engine = open_engine(url, pool_size=1)
    with engine.connect().execution_options(isolation_level=level) as conn:
        conn.execute(sa.select(tenant_queue))
    Direct(_ADD)(engine, {"tenant": "a", "start": 4})
    with engine.connect() as conn:
        assert conn.scalar(sa.select(sa.func.count()).select_from(tenant_queue)) == 1
    engine.dispose()


def test_it_is_prepared_unless_the_url_says_no(url: str) -> None:
    for asked, num in ((url, 1), (url + "&prepare_threshold=none", 0)):
        engine = open_engine(asked, pool_size=1)
        statement = Direct(sa.select(sa.func.count()).select_from(tenant_queue))
        for _ in range(3):
            assert statement(engine, {}) == [(0,)]
        with engine.connect() as conn:
            assert conn.scalar(sa.text("SELECT count(*) FROM pg_prepared_statements")) == num
        engine.dispose()


def test_a_default_that_python_fills_in_is_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        Direct(sa.insert(tenant_queue).values(tenant_id="a", lane="bulk", vtime=1))


def test_errors_are_those_of_sqlalchemy(url: str) -> None:
    engine = open_engine(url)
    Direct(_ADD)(engine, {"tenant": "a", "start": 4})
    with pytest.raises(IntegrityError):
        Direct(_ADD)(engine, {"tenant": "a", "start": 4})
    assert Direct(_ADD)(engine, {"tenant": "b", "start": 4}) == [("b", 5)]
    engine.dispose()
    nowhere = open_engine(sa.make_url(url).set(database="nowhere").render_as_string(hide_password=False))
    with pytest.raises(OperationalError, match="nowhere"):
        Direct(_ADD)(nowhere, {"tenant": "b", "start": 4})


def test_a_connection_that_was_cut_is_not_used_again(url: str, postgres: Postgres) -> None:
    engine = open_engine(url, pool_size=1)
    who = Direct(sa.select(sa.func.pg_backend_pid()))
    ((pid,),) = who(engine, {})
    postgres.execute(f"SELECT pg_terminate_backend({pid})")
    with pytest.raises(OperationalError) as caught:
        who(engine, {})
    assert caught.value.connection_invalidated
    assert who(engine, {}) != [(pid,)]
    engine.dispose()


def test_it_runs_again_after_a_lock_that_was_not_to_be_had(url: str) -> None:
    engine = open_engine(url)
    Direct(_ADD)(engine, {"tenant": "a", "start": 4})
    released = threading.Event()
    with psycopg.connect(sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)) as other:
        other.execute("SELECT 1 FROM tenant_queue FOR UPDATE")
        threading.Timer(2.5, lambda: (released.set(), other.rollback())).start()
        grown = sa.update(tenant_queue).values(vtime=tenant_queue.c.vtime + 1).returning(tenant_queue.c.vtime)
        assert Direct(grown)(engine, {}) == [(6,)]  # lock_timeout is 2 s
        assert released.is_set()
    engine.dispose()
