from __future__ import annotations

import sys
import warnings
from pathlib import Path
from subprocess import Popen
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from service.contract.dialects import open_engine
from service.contract.tables import metadata
from service.migrate import config_of, script_folder, upgrade


def _difference(url: str) -> list[object]:
    engine = open_engine(url)
    with engine.connect() as connection, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "autogenerate skipping metadata-specified expression-based index")
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found = compare_metadata(context, metadata)
    engine.dispose()
    return list(found)


def _shape(url: str) -> dict[str, Any]:
    engine = open_engine(url)
    if engine.dialect.name == "sqlite":
        query = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'alembic%' AND name NOT LIKE 'sqlite%'"
    else:
        query = """SELECT indexname, indexdef FROM pg_indexes
            WHERE schemaname = 'public' AND tablename <> 'alembic_version'
            UNION ALL SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE contype IN ('c', 'f')
            UNION ALL SELECT relname, array_to_string(reloptions, ',') FROM pg_class
            WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version'"""
    with engine.connect() as connection:
        found = {name: " ".join(sql.split()) if sql else sql for name, sql in connection.execute(sa.text(query))}
    engine.dispose()
    return found


def test_the_migrated_schema_is_the_one_in_tables(database_url: str) -> None:
    assert _difference(database_url) == []


def test_indexes_constraints_and_storage_are_those_of_tables(database_url: str, empty_database_url: str) -> None:
    engine = open_engine(empty_database_url)
    metadata.create_all(engine)
    engine.dispose()
    migrated, created = _shape(database_url), _shape(empty_database_url)
    if database_url.startswith("sqlite"):  # the order of a CREATE TABLE's constraints is free there
        migrated = {
            name: sorted(str(sql).replace("(", " ").replace(",", " ").split()) for name, sql in migrated.items()
        }
        created = {name: sorted(str(sql).replace("(", " ").replace(",", " ").split()) for name, sql in created.items()}
    assert migrated == created


def test_upgrade_downgrade_upgrade(empty_database_url: str) -> None:
    upgrade(empty_database_url)
    command.downgrade(config_of(empty_database_url), "base")
    engine = open_engine(empty_database_url)
    with engine.connect() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()
    upgrade(empty_database_url)
    assert _difference(empty_database_url) == []


def test_two_upgrades_at_once_wait_for_each_other(empty_database_url: str) -> None:
    code = f"from service.migrate import upgrade; upgrade({empty_database_url!r})"
    children = [Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert _difference(empty_database_url) == []


def test_upgrading_makes_the_folder_of_an_sqlite_file(tmp_path: Path) -> None:
    upgrade(f"sqlite:///{tmp_path / 'new' / 'folder' / 'isthmus.db'}")
    assert (tmp_path / "new" / "folder" / "isthmus.db").exists()


def test_the_scripts_are_found_in_a_checkout() -> None:
    assert (script_folder() / "env.py").exists()
    assert ScriptDirectory(str(script_folder())).get_current_head() == "0002"
