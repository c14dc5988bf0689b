"""The page for operators names every metric there is, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from service.contract.transact import read
from service.database import Database
from service.edge.queue_gauges import QueueGauges, look
from service.edge.telemetry import Telemetry
from worker.metrics import Metrics

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operations.md"


def families(registry: CollectorRegistry) -> set[str]:
    found = {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}
    return {name for name in found if name.startswith("isthmus_")}


def test_the_page_names_every_metric_and_no_other(engine: sa.Engine) -> None:
    telemetry = Telemetry()
    gauges = QueueGauges(Database(engine), ttl_s=20)
    gauges._reading = read(engine, lambda conn: look(conn, 20))
    telemetry.registry.register(gauges)
    there = families(telemetry.registry) | families(Metrics(heartbeat_age_s=lambda: 0.0).registry)
    named = set(re.findall(r"\bisthmus_[a-z_]+\b", PAGE.read_text(encoding="utf-8")))
    if engine.dialect.name == "sqlite":
        named.discard("isthmus_oldest_snapshot_age_seconds")
    assert named == there
