"""The database from the event loop: one transaction per call, in threads of its own.

A stalled database fills these threads and no others, so requests that need no rows go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, final

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service.contract.errors import TooMany, Unavailable
from service.contract.transact import read as read_only
from service.contract.transact import transact

T = TypeVar("T")
THREADS: Final = 8
MAX_WAITING: Final = 512
_READ_ONLY: Final = "25006"


@final
class Database:
    """Transactions in threads; what the database cannot do right now is Unavailable.

    The threads are an executor's, because `close` has to wait for a transaction whose caller was cancelled: its
    connection would otherwise come back to an engine that is closed, and stay open.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="database")
        self._num_calls = 0

    async def close(self) -> None:
        """Wait for the transactions under way, start no other and close the engine."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        self.engine.dispose()

    async def read(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction that writes nothing.

        Raises Unavailable if the database is down, TooMany if too many calls wait for it.
        """
        return await self._run(work, read=True)

    async def write(self, work: Callable[[sa.Connection], T]) -> T:
        """Run `work` in a transaction that is committed if it returns and rolled back if it raises.

        `work` may run several times and has no effects outside of it.
        Raises Unavailable if the database is down, TooMany if too many calls wait for it.
        """
        return await self._run(work, read=False)

    async def _run(self, work: Callable[[sa.Connection], T], *, read: bool) -> T:
        if self._num_calls >= THREADS + MAX_WAITING:
            raise TooMany("too many requests wait for the database")
        self._num_calls += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: self._transact(work, read=read))
        finally:
            self._num_calls -= 1

    def _transact(self, work: Callable[[sa.Connection], T], *, read: bool) -> T:
        try:
            return read_only(self.engine, work) if read else transact(self.engine, work)
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise Unavailable("the database does not answer", code="database_unavailable") from error
        except DBAPIError as error:
            # Within a failover the server may be the standby still, or again.
            if error.connection_invalidated or getattr(error.orig, "sqlstate", None) == _READ_ONLY:
                raise Unavailable("the database does not answer", code="database_unavailable") from error
            raise
