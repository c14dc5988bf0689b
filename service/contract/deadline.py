"""A PostgreSQL connection that does not wait for ever for a server that fell silent.

The server's own time-outs end a slow statement. They cannot end the wait for a host that is gone, a network that drops
packets, or a pooler that hangs: the client has to, or its thread is lost.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.waiting import Ready

if TYPE_CHECKING:
    from psycopg.abc import PQGen

Result = TypeVar("Result")

_IDLE_S: Final = 5.0  # what opens a transaction needs no lock, so it is answered at once


@final
class TimedConnection(psycopg.Connection[Any]):
    """Closes itself and raises OperationalError when an answer takes too long."""

    answer_s: float = 10.0

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """Wait for the end of one exchange with the server.

        Raises OperationalError after `answer_s`, or after 5 s if no transaction is open. What was asked may have been
        done nevertheless.
        """
        idle = self.pgconn.transaction_status == TransactionStatus.IDLE
        timed = self._timed(gen, min(self.answer_s, _IDLE_S) if idle else self.answer_s)
        return super().wait(timed, interval) if timeout is None else super().wait(timed, interval, timeout)

    def _timed(self, gen: PQGen[Result], limit_s: float) -> Generator[Any, Any, Result]:
        until = time.monotonic() + limit_s
        try:
            state = next(gen)
            while True:
                ready = yield state
                if ready == Ready.NONE and time.monotonic() > until:
                    self.close()
                    msg = f"the server did not answer within {limit_s:g} s"
                    raise psycopg.OperationalError(msg)
                state = gen.send(ready)
        except StopIteration as end:
            return end.value
