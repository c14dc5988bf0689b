"""A deployment changes the schema under workers that are at work, gives up rather than hold them, and can go back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy.exc import OperationalError

from service.contract.dialects import open_engine
from service.contract.jobs import IngestArgs
from service.migrate import config_of, upgrade
from tests.supervisors import ROOT

WORKER = Path(__file__).with_name("first_worker.py")


def _revisions(url: str) -> list[str]:
    """Return every revision, the first one first."""
    return [each.revision for each in ScriptDirectory.from_config(config_of(url)).walk_revisions()][::-1]


def _shape(url: str) -> dict[str, Any]:
    """Reflect all tables, in no order that a detour could change."""
    engine = open_engine(url)
    with engine.connect() as conn:
        found = sa.inspect(conn)
        shape = {
            name: {
                "columns": {each["name"]: (str(each["type"]), each["nullable"]) for each in found.get_columns(name)},
                "key": found.get_pk_constraint(name)["constrained_columns"],
                "indexes": {
                    str(each["name"]): (each["column_names"], each["unique"], _where(each))
                    for each in found.get_indexes(name)
                },
                "foreign": sorted(str(each) for each in found.get_foreign_keys(name)),
                "unique": sorted(str(each["column_names"]) for each in found.get_unique_constraints(name)),
                "checks": {str(each["name"]): each["sqltext"] for each in found.get_check_constraints(name)},
            }
            for name in found.get_table_names()
            if name != "alembic_version"
        }
        valid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
        assert conn.dialect.name == "sqlite" or conn.scalar(sa.text(valid)) == 0
    engine.dispose()
    return shape


def _where(index: Any) -> str:
    return next((str(value) for key, value in index.get("dialect_options", {}).items() if key.endswith("_where")), "")


def _add_jobs(engine: sa.Engine, num: int) -> None:
    """Add jobs as the first schema had them."""
    args = IngestArgs(dataset="ds_x", source="s").model_dump_json()
    clock = "isthmus_now()" if engine.dialect.name == "sqlite" else "statement_timestamp()"
    insert = f"""INSERT INTO job (public_id, tenant_id, lane, kind, state, priority, fair_seq, run_at, attempt,
            max_attempts, lease_epoch, deadline_s, args, created_at)
        VALUES (:name, 't', 'bulk', 'ingest', 'queued', 5, 0, {clock}, 0, 5, 0, 3600, :args, {clock})"""
    with engine.begin() as conn:
        conn.execute(sa.text(insert), [{"name": f"job_{number}", "args": args} for number in range(num)])


def test_every_revision_can_be_undone_and_done_again_with_jobs_in_the_tables(empty_database_url: str) -> None:
    url, shapes = empty_database_url, dict[str, Any]()
    revisions = _revisions(url)
    upgrade(url, revisions[0])
    engine = open_engine(url)
    _add_jobs(engine, 10)
    for revision in revisions:
        upgrade(url, revision)
        shapes[revision] = _shape(url)
    for revision in revisions[-2::-1]:
        command.downgrade(config_of(url), revision)
        assert _shape(url) == shapes[revision]
    for revision in revisions:
        upgrade(url, revision)
        assert _shape(url) == shapes[revision]
    with engine.connect() as conn:
        assert conn.scalar(sa.text("SELECT count(*) FROM job WHERE state = 'queued'")) == 10
    engine.dispose()


def _count(engine: sa.Engine, query: str) -> int:
    with engine.connect().execution_options(sqlite_read=True) as conn:
        return conn.execute(sa.text(query)).scalar_one()


@contextmanager
def _first_workers(url: str, num: int) -> Generator[list[subprocess.Popen[str]]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", str(WORKER), url, f"w{number}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(num)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_an_upgrade_under_two_workers_of_the_first_schema_fails_none_of_their_jobs(
    empty_database_url: str, check_invariants: Callable[..., Counter[str]]
) -> None:
    url, num = empty_database_url, 400
    upgrade(url, _revisions(url)[0])
    engine = open_engine(url)
    with _first_workers(url, 2) as workers:
        give_up_at = time.monotonic() + 60
        while _count(engine, "SELECT count(*) FROM worker") < 2:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        _add_jobs(engine, num)
        for worker in workers:  # both are at work
            assert worker.stdout is not None
            assert worker.stdout.readline().startswith("job_"), worker.communicate()
        upgrade(url)
        during = _count(engine, "SELECT count(*) FROM job WHERE state = 'succeeded'")
        said = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], [err for _, err in said]
    assert during < num, "nothing was left to do when the upgrade was through"
    assert check_invariants(engine, [f"job_{number}" for number in range(num)]) == {"succeeded": num}
    assert _count(engine, "SELECT max(attempt) FROM job") == 1
    engine.dispose()


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.getfixturevalue("postgres").database("template0") as url:
        yield url


@pytest.mark.parametrize(
    "hold",
    [
        "SELECT count(*) FROM job",  # a reader: no column can be added
        "SELECT count(*) FROM worker",  # a snapshot: no index can be completed, although the column was added
        "UPDATE tenant_queue SET weight = 1",  # a writer of the other table
    ],
)
def test_an_upgrade_that_meets_a_long_lock_gives_up_soon_and_can_be_run_again(postgres_url: str, hold: str) -> None:
    url = postgres_url
    upgrade(url, _revisions(url)[0])
    engine = open_engine(url)
    _add_jobs(engine, 10)
    with engine.connect() as holder:
        holder.execute(sa.text("SET idle_in_transaction_session_timeout = 0"))
        holder.commit()
        holder.execution_options(isolation_level="REPEATABLE READ")
        holder.execute(sa.text(hold))
        slowest_s = [0.0]
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(0.01):
                began = time.monotonic()
                with engine.begin() as conn:
                    conn.execute(sa.text("UPDATE job SET priority = 4 WHERE public_id = 'job_1'"))
                slowest_s[0] = max(slowest_s[0], time.monotonic() - began)

        thread = threading.Thread(target=work)
        thread.start()
        began = time.monotonic()
        with pytest.raises(OperationalError, match="lock timeout"):
            upgrade(url)
        took_s = time.monotonic() - began
        stop.set()
        thread.join()
        holder.rollback()
    assert took_s < 10
    assert slowest_s[0] < 5  # behind the upgrade for no longer than it waited itself
    upgrade(url)
    upgraded = _shape(url)
    command.downgrade(config_of(url), "base")
    upgrade(url)
    assert _shape(url) == upgraded
    engine.dispose()


def test_an_upgrade_of_sqlite_waits_for_a_writer(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'isthmus.db'}"
    upgrade(url, _revisions(url)[0])
    engine = open_engine(url)
    with engine.begin():
        thread = threading.Thread(target=upgrade, args=(url,))
        thread.start()
        thread.join(1)
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()
    assert "job_fair" in _shape(url)["job"]["indexes"]
    engine.dispose()
