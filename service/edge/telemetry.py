"""What this process has served, for Prometheus: a registry of its own, since tests make many applications."""

from __future__ import annotations

import resource
import sys
from typing import Final, final

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from starlette.types import Scope

BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_METHODS: Final = frozenset({"GET", "POST", "PATCH", "DELETE", "HEAD"})


@final
class Telemetry:
    """The figures of one application."""

    def __init__(self) -> None:
        disable_created_metrics()
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self.in_flight = Gauge("isthmus_requests_in_flight", "Requests that are being answered", registry=own)
        self.label_cache_hits = Gauge("isthmus_label_cache_hits", "Labels whose vectors were kept", registry=own)
        self.label_cache_misses = Gauge("isthmus_label_cache_misses", "Labels that had to be embedded", registry=own)
        peak = Gauge("isthmus_peak_memory_bytes", "Most memory that this process ever had", registry=own)
        peak.set_function(_peak_memory)
        self._requests = Histogram(
            "isthmus_request_duration_seconds",
            "Requests, from the first byte of the head to the last of the answer",
            ["method", "path", "status"],
            buckets=BUCKETS_S,
            registry=own,
        )

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answer under its route's path, never under the path that was sent."""
        route = scope.get("route")
        path = str(getattr(route, "path", "unknown"))
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, path, status).observe(seconds)

    def text(self) -> bytes:
        """Write everything in the text format."""
        return generate_latest(self.registry)


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
