"""The database from the event loop: nothing of it outlives the application."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from service.database import Database

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_the_connection_of_a_cancelled_call_is_closed_with_the_others(engine: sa.Engine) -> None:
    opened: list[Any] = []
    event.listen(engine, "connect", lambda connection, _record: opened.append(connection))
    begun = threading.Event()

    def sleep(conn: sa.Connection) -> None:
        begun.set()
        conn.execute(sa.text("SELECT pg_sleep(0.5)"))

    database = Database(engine)
    call = asyncio.create_task(database.read(sleep))
    assert await asyncio.to_thread(begun.wait, 10)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await database.close()
    assert opened
    assert all(connection.closed for connection in opened)
