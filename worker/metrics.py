"""What this supervisor did, for Prometheus: a registry of its own, and a port of its own where the settings name one.

No label tells who a job belongs to: whoever may read metrics learns kinds, lanes and states.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from service.contract.jobs import State
from worker.running import Failed, Outcome, Stopped

_log = logging.getLogger(__name__)
_CLAIM_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_JOB_BUCKETS_S: Final = (0.5, 2.0, 10.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 43_200.0, 86_400.0, 604_800.0)
_DEATHS: Final = {"RunnerDied": "died", "RunnerBroken": "broken", "Deadline": "deadline"}


@final
class Metrics:
    """Counters of one supervisor."""

    def __init__(self, *, heartbeat_age_s: Callable[[], float]) -> None:
        disable_created_metrics()
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        name = "isthmus_supervisor_{}".format
        self.claim_seconds = Histogram(
            name("claim_seconds"),
            "Claims, those that found nothing too",
            ["lane"],
            buckets=_CLAIM_BUCKETS_S,
            registry=own,
        )
        self.claims = Counter(name("claims"), "Jobs claimed", ["kind"], registry=own)
        self.rescues = Counter(name("rescues"), "Jobs of dead workers, by what became of them", ["state"], registry=own)
        self.stale_writes = Counter(
            name("stale_writes"), "Writes refused because the lease was lost", ["what"], registry=own
        )
        self.put_back = Counter(
            name("put_back"), "Attempts that ended with the job back in the queue", ["kind", "why"], registry=own
        )
        self._ended = Counter(name("jobs_ended"), "Jobs that ended here", ["kind", "state"], registry=own)
        self._job_seconds = Histogram(
            name("job_seconds"), "Attempts, from claim to end", ["kind"], buckets=_JOB_BUCKETS_S, registry=own
        )
        self._deaths = Counter(
            name("runner_deaths"),
            "Runners that ended before their job or had to be killed",
            ["kind", "why"],
            registry=own,
        )
        self._outages = Counter(name("database_outages"), "Times that the database went away", registry=own)
        self._database_up = Gauge(name("database_up"), "Whether the database answered last time", registry=own)
        age = Gauge(name("heartbeat_age_seconds"), "Since the database took a heartbeat of this worker", registry=own)
        age.set_function(heartbeat_age_s)
        for what in ("end", "report"):
            self.stale_writes.labels(what)  # a counter that appears with its first increment has no rate then

    def serve(self, listen: str) -> str:
        """Serve the registry from a thread and return the address; the thread ends with the process.

        Raises ValueError for an address that is none, or cannot be bound.
        """
        host, colon, port = listen.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65_535:
            msg = f"ISTHMUS_METRICS_LISTEN: {listen} is not host:port"
            raise ValueError(msg)
        try:
            server, _ = start_http_server(int(port), addr=host.strip("[]") or "0.0.0.0", registry=self.registry)  # noqa: S104
        except OSError as error:
            msg = f"ISTHMUS_METRICS_LISTEN: {listen} cannot be bound: {error.strerror or error}"
            raise ValueError(msg) from error
        address = f"{host}:{server.server_port}"
        _log.info("metrics served", extra={"fields": {"address": address}})
        return address

    def database(self, *, is_up: bool, was_up: bool) -> None:
        """Note whether the database answered."""
        self._database_up.set(is_up)
        if was_up and not is_up:
            self._outages.inc()

    def ended(self, kind: str, outcome: Outcome, state: State | None, seconds: float) -> None:
        """Count the end of an attempt, which left the job in a state; None: the lease was lost."""
        self._job_seconds.labels(kind).observe(seconds)
        if isinstance(outcome, Failed) and (why := _DEATHS.get(str(outcome.error.get("type")))) is not None:
            self._deaths.labels(kind, why).inc()
        match state:
            case None:
                if outcome != Stopped("lost"):  # else nothing was written
                    self.stale_writes.labels("end").inc()
            case "scheduled":
                self.put_back.labels(kind, "retry").inc()
            case "queued":
                self.put_back.labels(kind, "release").inc()
            case _:
                self._ended.labels(kind, state).inc()
