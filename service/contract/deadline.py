"""A PostgreSQL connection that does not wait for ever for a server that fell silent.

The server's own time-outs end a slow statement. They cannot end the wait for a host that is gone, a network that drops
packets, or a pooler that hangs: the client has to, or its thread is lost.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, final

import psycopg
from psycopg.waiting import Ready

if TYPE_CHECKING:
    from psycopg.abc import PQGen

Result = TypeVar("Result")


@final
class TimedConnection(psycopg.Connection[Any]):
    """Closes itself and raises OperationalError when an answer takes too long."""

    answer_s: float = 10.0

    def wait(self, gen: PQGen[Result], interval: float = 0.1, timeout: float | None = None) -> Result:
        """Wait for the end of one exchange with the server.

        Raises OperationalError after `answer_s`; what was asked may have been done nevertheless.
        """
        timed = self._timed(gen, self.answer_s)
        return super().wait(timed, interval) if timeout is None else super().wait(timed, interval, timeout)

    @contextmanager
    def answering_within(self, seconds: float) -> Generator[None]:
        """Wait no longer than this for every answer."""
        before, self.answer_s = self.answer_s, seconds
        try:
            yield
        finally:
            self.answer_s = before

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
