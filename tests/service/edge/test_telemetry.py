from __future__ import annotations

import sys
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.anyio

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(api: Any) -> Samples:
    response = await api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def of(path: str, status: int, method: str = "GET", **labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"method": method, "path": path, "status": str(status), **labels}.items()))


async def test_requests_are_counted_by_route_and_status_in_buckets(small: Any) -> None:
    await small.get("/v1/jobs/job_secret")
    await small.get("/v1/jobs/job_other")
    await small.client.request("BREW", "/v1/jobs")
    found = await scrape(small)
    name = "isthmus_request_duration_seconds"
    assert found[f"{name}_count", of("/v1/jobs/{job_id}", 404)] == 2
    assert found[f"{name}_bucket", of("/v1/jobs/{job_id}", 404, le="+Inf")] == 2
    assert 0 < found[f"{name}_sum", of("/v1/jobs/{job_id}", 404)] < 60
    assert [key for key in found if ("method", "other") in key[1]]
    assert not [key for key in found if "secret" in str(key) or "BREW" in str(key) or key[0].endswith("_created")]


async def test_a_scrape_sees_itself_in_flight_and_the_process_it_runs_in(small: Any) -> None:
    found = await scrape(small)
    assert found["isthmus_requests_in_flight", ()] == 1
    assert found["isthmus_peak_memory_bytes", ()] > 10_000_000
    assert (found["isthmus_label_cache_hits", ()], found["isthmus_label_cache_misses", ()]) == (0, 0)
    if sys.platform == "linux":
        assert found["process_start_time_seconds", ()] > 1_000_000_000


async def test_every_application_counts_for_itself(start: Any, tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path / 'none.db'}"
    async with start(url) as one, start(url) as other:
        await one.get("/healthz")
        key = ("isthmus_request_duration_seconds_count", of("/healthz", 200))
        assert key in await scrape(one)
        assert key not in await scrape(other)
