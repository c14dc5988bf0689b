"""Statements of PostgreSQL that a busy worker runs all the time: compiled once, prepared, on the driver's own cursor.

SQLAlchemy's way from an engine to rows costs the client about four times what these statements cost it, and without
preparing them the server plans them anew each time. What both know of connections, errors and time-outs stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast, final

import psycopg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import DBAPIError

from service.contract.transact import again

_DIALECT: Final = PGDialect_psycopg()


@final
class Direct:
    """One statement, atomic by itself."""

    def __init__(self, statement: sa.Executable) -> None:
        """Compile it.

        Raises ValueError for an insertion that leaves a column's default to Python.
        """
        compiled = cast("sa.Select[Any]", statement).compile(dialect=_DIALECT)
        if compiled.insert_prefetch:
            msg = f"give values to {', '.join(column.name for column in compiled.insert_prefetch)}"
            raise ValueError(msg)
        self._sql = str(compiled)
        self._params = compiled.params

    def __call__(self, engine: sa.Engine, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Run it and return its rows; again after a deadlock and the like, as `transact` does.

        Raises what SQLAlchemy would.
        """
        return again(lambda: self._run(engine, {**self._params, **params}))

    def _run(self, engine: sa.Engine, params: dict[str, Any]) -> list[tuple[Any, ...]]:
        pooled = None
        try:
            pooled = engine.raw_connection()
            connection = cast("psycopg.Connection[tuple[Any, ...]]", pooled.driver_connection)
            return connection.execute(self._sql.encode(), params, prepare=True).fetchall()
        except psycopg.Error as error:
            is_lost = pooled is None or cast("psycopg.Connection", pooled.driver_connection).closed
            if pooled is not None and is_lost:
                pooled.invalidate(error)
            raise DBAPIError.instance(
                self._sql, params, error, psycopg.Error, connection_invalidated=is_lost, dialect=engine.dialect
            ) from error
        finally:
            if pooled is not None:
                pooled.close()
