"""Bring a database to the schema of this version."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory


def script_folder() -> Path:
    """Find the migrations: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "migrations"
    return packaged if (packaged / "env.py").exists() else here.parent / "migrations"


def upgrade(url: str, revision: str = "head") -> None:
    """Upgrade the database at a SQLAlchemy URL, making the folder of an SQLite file.

    Two migrations at once wait for each other. Raises what the database raises.
    """
    command.upgrade(_config(url), revision)


def downgrade(url: str, revision: str) -> None:
    """Take the database at a SQLAlchemy URL back to a revision; `base` is an empty one."""
    command.downgrade(_config(url), revision)


def head() -> str | None:
    """Return the revision that this version expects."""
    return ScriptDirectory(str(script_folder())).get_current_head()


def _config(url: str) -> Config:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.set_main_option("script_location", str(script_folder()).replace("%", "%%"))
    config.attributes["url"] = url
    return config
