"""Probes: is the process alive, and can it take requests or jobs."""

from __future__ import annotations

from typing import Literal

import sqlalchemy as sa
from fastapi import APIRouter, Response

from service.contract.dialects import after
from service.contract.errors import IsthmusError
from service.contract.tables import worker
from service.contract.word import Word
from service.deps import Running

router = APIRouter(tags=["probes"])


class Health(Word):
    """The process is alive."""

    status: Literal["ok"] = "ok"


class Readiness(Word):
    """What can be taken."""

    status: Literal["ok", "degraded", "unavailable"]
    missing: list[str]


@router.get("/healthz", operation_id="get_health", summary="Tell that the process is alive")
async def get_health() -> Health:
    """Answer from the event loop alone: no database, no worker."""
    return Health()


@router.get(
    "/readyz",
    operation_id="get_readiness",
    summary="Tell whether requests or jobs can be taken",
    responses={503: {"model": Readiness, "description": "Draining, or neither requests nor jobs can be taken."}},
)
async def get_readiness(service: Running, response: Response) -> Readiness:
    """Say what is missing; 503 only if nothing can be taken at all."""
    missing: list[str] = []
    try:
        lanes = await service.database.read(lambda conn: _live_lanes(conn, service.settings.worker_ttl_s))
    except IsthmusError:
        lanes = None
        missing.append("database")
    inference = service.gateway.ready()
    if not inference:
        missing.append("inference")
    missing += [f"worker for {lane} jobs" for lane in ("train", "bulk") if lanes is not None and lane not in lanes]
    jobs = lanes is not None  # without a worker they wait in the queue
    if service.draining:
        missing.insert(0, "draining")
    if service.draining or not (jobs or inference):
        response.status_code = 503
        return Readiness(status="unavailable", missing=missing)
    return Readiness(status="degraded" if missing else "ok", missing=missing)


def _live_lanes(conn: sa.Connection, ttl_s: float) -> set[str]:
    live = sa.select(worker.c.lanes).where(worker.c.draining.is_(False), worker.c.last_seen > after(sa.literal(-ttl_s)))
    return {lane for (lanes,) in conn.execute(live) for lane in lanes}
