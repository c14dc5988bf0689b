"""A lane's place for one job: an idle runner with torch imported, and the one at work."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Final, final

from service.contract.jobs import IngestArgs, Lane
from service.contract.leases import Claim
from worker.child import Child
from worker.running import Running
from worker.task import Task

_log = logging.getLogger(__name__)
OLDEST_EVERY: Final = 16
_RESPAWN_S: Final = 5.0  # an idle runner that dies is not started again in a loop


@final
class Slot:
    """Runs one job at a time."""

    def __init__(self, lane: Lane, *, preload: bool, environment: dict[str, str]) -> None:
        self.lane: Lane = lane
        self.running: Running | None = None
        self._num_started = 0
        self._preload = preload
        self._environment = environment
        self._idle: Child | None = None
        self._scratch: Path | None = None
        self._respawn_at = 0.0

    @property
    def wants_oldest(self) -> bool:
        """Whether the next job is the oldest, whatever its priority.

        One in sixteen is, so a job of priority 9 starts after at most sixteen times the jobs before it in the fair
        order, and a stream of urgent ones holds nobody up for ever.
        """
        return self._num_started % OLDEST_EVERY == OLDEST_EVERY - 1

    def start(
        self,
        claim: Claim,
        *,
        scratch: Path,
        store_url: str,
        import_folders: tuple[Path, ...],
        device: str,
        num_threads: int,
    ) -> None:
        """Give a job to the idle runner, or to a fresh one: ingest gets one that never imports torch.

        Raises OSError if there is no room for a process or its folder.
        """
        task = Task(
            job=claim.public_id,
            epoch=claim.epoch,
            attempt=claim.attempt,
            request_id=claim.request_id,
            args=claim.args,
            inputs=claim.inputs,
            resume=claim.resume,
            store_url=store_url,
            import_folders=import_folders,
            scratch=scratch,
            device=device,
            threads=num_threads,
        )
        scratch.mkdir(parents=True, exist_ok=True)
        child = None
        if not isinstance(claim.args, IngestArgs):
            child, self._idle = self._idle, None
            if child is not None and child.exit_status() is not None:
                child.close()
                child = None
        child = child or Child(preload=False, environment=self._environment)
        child.send(task.model_dump(mode="json"))
        self._scratch = scratch
        self.running = Running(claim, child)
        self._num_started += 1

    def free(self) -> bool:
        """Free the slot once its job is over; return whether that was now."""
        if self.running is None or not self.running.over:
            return False
        self.running.child.close()
        self.running = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        return True

    def prepare(self, *, stopping: bool) -> None:
        """Keep an idle runner ready, unless the worker stops."""
        if self._idle is not None and (stopping or self._idle.exit_status() is not None):
            self._idle.close()
            self._idle = None
        if self._preload and not stopping and self._idle is None and time.monotonic() >= self._respawn_at:
            self._respawn_at = time.monotonic() + _RESPAWN_S
            try:
                self._idle = Child(preload=True, environment=self._environment)
            except OSError as error:
                _log.warning("no idle runner", extra={"fields": {"lane": self.lane, "error": str(error)}})

    def close(self) -> None:
        """Kill what runs here."""
        for child in (self._idle, self.running.child if self.running is not None else None):
            if child is not None:
                child.close()
        self._idle = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
