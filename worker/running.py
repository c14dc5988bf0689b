"""A claimed job and the runner that works on it: what came over the channel, and how the attempt ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from pydantic import ValidationError

from service.contract.jobs import AnyResult, result_adapter
from service.contract.leases import Claim
from service.contract.outcomes import Batch, Saved
from worker.child import BrokenChannel, Child, ending

_WRITE_S: Final = 1.0
_EXIT_S: Final = 5.0  # from the last message to the end of the process
_MAX_METRICS: Final = 100_000  # kept while the database is away
_MAX_EVENTS: Final = 10_000


@dataclass(frozen=True)
class Done:
    """The job has a result."""

    result: AnyResult


@dataclass(frozen=True)
class Failed:
    """The attempt failed."""

    error: dict[str, Any]
    retry: bool


@dataclass(frozen=True)
class Stopped:
    """The runner stopped because it was asked to; `lost` means that somebody else has the lease by now."""

    why: Literal["cancel", "interrupt", "lost"]


Outcome = Done | Failed | Stopped
Reason = Literal["cancel", "interrupt", "lost", "deadline", "channel"]


@final
class Running:
    """One attempt at a job, from its start until the database knows its end."""

    def __init__(self, claim: Claim, child: Child) -> None:
        now = time.monotonic()
        self.claim = claim
        self.child = child
        self.batch = Batch()
        self.started_at = now
        self.written_at = now - _WRITE_S  # the first report is written as it comes
        self.outcome: Outcome | None = None
        self.settled = False
        self.asked: Literal["cancel", "interrupt"] | None = None
        self.status: int | None = None
        self._deadline = now + claim.deadline_s
        self._kill_at: float | None = None
        self._kill_reason: Reason | None = None
        self._broken: str | None = None

    @property
    def over(self) -> bool:
        """Whether the process is gone and nothing is left to be written."""
        return self.settled and self.status is not None

    def is_due(self, now: float) -> bool:
        """Whether something is to be written: the end at once, what was reported at most once a second."""
        if self.settled:
            return False
        return self.outcome is not None or (bool(self.batch) and now - self.written_at >= _WRITE_S)

    def ask(self, what: Literal["cancel", "interrupt"], grace_s: float) -> None:
        """Ask the runner to stop, and kill it after a while if it does not; a cancel overrules an interrupt."""
        if self.outcome is not None or self.asked in ("cancel", what):
            return
        self.asked = what
        self.child.send({what: True})
        self.kill_after(grace_s, what)

    def kill_after(self, seconds: float, reason: Reason) -> None:
        """Kill the runner then, unless it ends before."""
        self._kill_at = time.monotonic() + seconds
        self._kill_reason = reason

    def read(self) -> None:
        """Take in what the runner wrote, see whether it ended, and kill it when its time is up."""
        if self.status is not None:
            return
        try:
            for message in self.child.messages():
                self._take(message)
        except BrokenChannel as error:
            self._broken = str(error)
            self.kill_after(0, "channel")
        now = time.monotonic()
        if now > self._deadline and self.outcome is None and self._kill_reason is None:
            self.kill_after(0, "deadline")
        if self._kill_at is not None and now >= self._kill_at:
            self.child.kill()
        self.status = self.child.exit_status()
        if self.status is not None and self.outcome is None:
            self._take_rest()
            self.outcome = self.outcome or self._ended(self.status)

    def _take_rest(self) -> None:
        # What was written between the last look and the end.
        try:
            for message in self.child.messages():
                self._take(message)
        except BrokenChannel as error:
            self._broken = str(error)

    def _take(self, message: dict[str, Any]) -> None:
        if self.outcome is not None:
            return
        try:
            match message:
                case {"progress": {"done": int(done), "total": int() | None as total, "eta_s": eta_s}}:
                    self.batch.progress = (done, total, None if eta_s is None else float(eta_s))
                case {"metric": {"step": int(step), "values": dict(values)}}:
                    self.batch.metrics.append((step, {str(k): float(v) for k, v in values.items()}))
                    del self.batch.metrics[:-_MAX_METRICS]
                case {"event": {"type": str(kind), "detail": dict(detail)}}:
                    self.batch.events.append((kind[:32], detail))
                    del self.batch.events[:-_MAX_EVENTS]
                case {"checkpoint": dict(saved)}:
                    self.batch.checkpoints.append(Saved(**saved))
                case {"done": result}:
                    self.outcome = Done(result_adapter.validate_python(result))
                case {"failed": {"permanent": bool(permanent), **error}}:
                    self.outcome = Failed(error, retry=not permanent)
                case {"cancelled": True}:
                    self.outcome = Stopped("cancel")
                case {"interrupted": True}:
                    self.outcome = Stopped("interrupt")
                case _:
                    self._broken = "the runner wrote a message that is unknown"
                    self.kill_after(0, "channel")
        except (ValidationError, TypeError, ValueError) as error:
            self._broken = f"the runner wrote a message that cannot be read: {error}"
            self.kill_after(0, "channel")
        if self.outcome is not None:
            self.kill_after(_EXIT_S, self._kill_reason or "channel")

    def _ended(self, status: int) -> Outcome:
        match self._kill_reason:
            case "cancel" | "interrupt" | "lost" as why:
                return Stopped(why)
            case "deadline":
                message = f"the job ran for longer than {self.claim.deadline_s:,} s"
                return Failed({"type": "Deadline", "message": message, "code": "deadline_exceeded"}, retry=True)
            case "channel":
                message = self._broken or "the runner broke its channel"
                return Failed({"type": "RunnerBroken", "message": message, "code": None}, retry=False)
            case None:
                message = f"the runner {ending(status)} before the job ended"
                return Failed({"type": "RunnerDied", "message": message, "code": "runner_died"}, retry=True)
