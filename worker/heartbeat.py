"""The heartbeat: a thread with a connection of its own, so that nothing the supervisor does can hold it up."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final, final

from sqlalchemy.exc import SQLAlchemyError

from service.contract import leases
from service.contract.dialects import open_engine

_log = logging.getLogger(__name__)
_LATE_S: Final = 1.0  # no heartbeat counts as late before


@final
class Heartbeat:
    """Says that a worker lives, every few seconds."""

    def __init__(self, url: str, interval_s: float) -> None:
        self._engine = open_engine(url, pool_size=1)
        self._interval_s = interval_s
        self._worker_id: str | None = None
        self._stop = threading.Event()
        self._dead = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._well_since: float | None = None
        self._beaten_at = 0.0
        self._taken_at = time.monotonic()

    @property
    def declared_dead(self) -> bool:
        """Whether somebody removed this worker's row: everything it runs is lost."""
        return self._dead.is_set()

    def well_for_s(self) -> float:
        """Return for how long the database has taken every heartbeat in time, seconds.

        Zero while one is late: who was frozen, suspended or kept waiting may find the others as late as itself.
        """
        if self._is_late():
            return 0.0
        since = self._well_since
        return 0.0 if since is None else time.monotonic() - since

    def age_s(self) -> float:
        """Return how long ago the database last took a heartbeat; before the first, since this was made; seconds."""
        return time.monotonic() - self._taken_at

    def beat_for(self, worker_id: str) -> None:
        """Start, or go on under a new id."""
        self._worker_id = worker_id
        self._well_since = self._taken_at = time.monotonic()
        self._beaten_at = time.time()
        self._dead.clear()
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        """Stop and close the connection."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._engine.dispose()

    def _is_late(self) -> bool:
        # By the wall clock: the monotonic one stands still while the host is suspended.
        return time.time() - self._beaten_at > max(2 * self._interval_s, _LATE_S)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            worker_id = self._worker_id
            if worker_id is None or self._dead.is_set():
                continue
            try:
                answer = leases.heartbeat(self._engine, worker_id)
            except SQLAlchemyError as error:  # whatever it is, the next beat may get through
                self._well_since = None
                _log.warning("heartbeat failed", extra={"fields": {"worker": worker_id, "error": _first_line(error)}})
                continue
            self._taken_at = time.monotonic()
            if self._well_since is None or self._is_late():
                self._well_since = self._taken_at
            self._beaten_at = time.time()  # after `_well_since`, which others read after it
            if not answer.alive and worker_id == self._worker_id:
                self._dead.set()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
