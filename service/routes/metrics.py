"""What this process and its queue are doing, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from service.deps import Running
from service.edge.telemetry import CONTENT_TYPE

router = APIRouter(tags=["probes"])


@router.get(
    "/metrics",
    operation_id="get_prometheus_metrics",
    summary="Report counters for Prometheus",
    response_class=PlainTextResponse,
)
async def get_prometheus_metrics(service: Running) -> PlainTextResponse:
    """Report requests by route and status, and the queue and its workers if the database answers."""
    await service.queue_gauges.refresh()
    service.telemetry.label_cache_hits.set(service.labels.hits)
    service.telemetry.label_cache_misses.set(service.labels.misses)
    return PlainTextResponse(service.telemetry.text(), media_type=CONTENT_TYPE)
