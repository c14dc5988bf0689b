"""Counters for Prometheus, written by hand: its text format is a page long and a client library is a dependency."""

from __future__ import annotations

import math
import resource
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final, final

from starlette.types import Scope

BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, math.inf)


@dataclass
class _Series:
    counts: list[int] = field(default_factory=lambda: [0] * len(BUCKETS_S))
    total_s: float = 0.0


@final
class Telemetry:
    """What this process has served."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._started = time.time()
        self._series: defaultdict[tuple[str, str, int], _Series] = defaultdict(_Series)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        """Count an answer under its route's path, never under the path that was sent."""
        route = scope.get("route")
        path = str(getattr(route, "path", "unknown"))
        method = scope["method"] if scope["method"] in {"GET", "POST", "PATCH", "DELETE", "HEAD"} else "other"
        series = self._series[method, path, status]
        series.counts[bisect_left(BUCKETS_S, seconds)] += 1
        series.total_s += seconds

    def text(self, gauges: dict[str, dict[str, float]]) -> str:
        """Write everything in the text format; `gauges` maps a name to values by label (`key="value"` or empty)."""
        lines = ["# TYPE isthmus_requests_in_flight gauge", f"isthmus_requests_in_flight {self.in_flight}"]
        lines += ["# TYPE process_start_time_seconds gauge", f"process_start_time_seconds {self._started:.3f}"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        lines += ["# TYPE isthmus_peak_memory_bytes gauge", f"isthmus_peak_memory_bytes {peak}"]
        for name, values in gauges.items():
            lines.append(f"# TYPE {name} gauge")
            lines += [f"{name}{{{label}}} {value}" if label else f"{name} {value}" for label, value in values.items()]
        lines.append("# TYPE isthmus_request_duration_seconds histogram")
        for (method, path, status), series in sorted(self._series.items()):
            labels = f'method="{method}",path="{path}",status="{status}"'
            seen = 0
            for bound, count in zip(BUCKETS_S, series.counts, strict=True):
                seen += count
                edge = "+Inf" if bound == math.inf else f"{bound:g}"
                lines.append(f'isthmus_request_duration_seconds_bucket{{{labels},le="{edge}"}} {seen}')
            lines.append(f"isthmus_request_duration_seconds_sum{{{labels}}} {series.total_s:.6f}")
            lines.append(f"isthmus_request_duration_seconds_count{{{labels}}} {seen}")
        return "\n".join(lines) + "\n"
