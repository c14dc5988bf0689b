"""The database from the event loop: one transaction per call, in threads of its own.

A stalled database fills these threads and no others, so requests that need no rows go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, final

import anyio
import anyio.to_thread
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
    """Transactions in threads; what the database cannot do right now is Unavailable."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._limiter = anyio.CapacityLimiter(THREADS)

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
        if self._limiter.statistics().tasks_waiting >= MAX_WAITING:
            raise TooMany("too many requests wait for the database")
        return await anyio.to_thread.run_sync(self._transact, work, read, limiter=self._limiter)

    def _transact(self, work: Callable[[sa.Connection], T], read: bool) -> T:  # noqa: FBT001  # run_sync passes by place
        try:
            return read_only(self.engine, work) if read else transact(self.engine, work)
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise Unavailable("the database does not answer", code="database_unavailable") from error
        except DBAPIError as error:
            # Within a failover the server may be the standby still, or again.
            if error.connection_invalidated or getattr(error.orig, "sqlstate", None) == _READ_ONLY:
                raise Unavailable("the database does not answer", code="database_unavailable") from error
            raise
