"""Bring a database to the schema of this version."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config


def script_folder() -> Path:
    """Find the migrations: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "migrations"
    return packaged if (packaged / "env.py").exists() else here.parent / "migrations"


def upgrade(url: str, revision: str = "head") -> None:
    """Upgrade the database at a SQLAlchemy URL, making the folder of an SQLite file.

    Two migrations at once wait for each other. Raises what the database raises.
    """
    command.upgrade(config_of(url), revision)


def config_of(url: str) -> Config:
    """Return what Alembic's commands take for the database at a SQLAlchemy URL."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.set_main_option("script_location", str(script_folder()).replace("%", "%%"))
    config.attributes["url"] = url
    return config
