from __future__ import annotations

import json
import signal
import socket
import urllib.request
from typing import Any

import psutil
import pytest
import sqlalchemy as sa
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.contract.tables import job
from tests.supervisors import World, runner_of
from worker.metrics import Metrics
from worker.running import Failed, Stopped

SQLITE_ONLY = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _parse(text: str) -> Samples:
    return {
        (sample.name.removeprefix("isthmus_supervisor_"), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _scrape(address: str) -> Samples:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return _parse(answer.read().decode())


def _of(metrics: Metrics) -> Samples:
    return _parse(generate_latest(metrics.registry).decode())


def _events(world: World, name: str) -> list[dict[str, Any]]:
    lines = (world.data / "worker-0.log").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == name]


@SQLITE_ONLY
def test_a_worker_serves_what_it_claimed_how_it_ended_and_how_its_runners_died(world: World) -> None:
    feed = world.feed()
    with world.worker(ISTHMUS_METRICS_LISTEN="127.0.0.1:0") as process:
        (served,) = world.until(lambda: _events(world, "metrics served"))
        before = _scrape(served["address"])
        assert before["stale_writes_total", (("what", "end"),)] == 0
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        runner_of(process).send_signal(signal.SIGKILL)
        world.until(lambda: world.row(public_id).attempt == 2 or world.row(public_id).state == "scheduled")
        with world.engine.begin() as conn:
            conn.execute(sa.update(job).values(run_at=job.c.created_at))
        world.until_it_reads(public_id, attempt=2)
        feed.end()
        world.until_state(public_id, "succeeded")
        failing = world.ingest("nowhere")
        world.until_state(failing, "failed")
        world.until(lambda: len(_events(world, "ended")) == 3)
        found = _scrape(served["address"])
        kind = ("kind", "ingest")
        assert found["claims_total", (kind,)] == 3
        assert found["runner_deaths_total", (kind, ("why", "died"))] == 1
        assert found["put_back_total", (kind, ("why", "retry"))] == 1
        assert found["jobs_ended_total", (kind, ("state", "succeeded"))] == 1
        assert found["jobs_ended_total", (kind, ("state", "failed"))] == 1
        assert found["job_seconds_count", (kind,)] == 3
        assert found["claim_seconds_count", (("lane", "bulk"),)] >= 3
        assert found["database_up", ()] == 1
        assert found["heartbeat_age_seconds", ()] < 5
        assert not any(public_id in str(key) or ("tenant" in str(key)) for key in found)
        assert not any(name.endswith("_created") for name, _ in found)


@SQLITE_ONLY
def test_an_address_that_is_taken_or_none_is_said_at_the_start(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with world.worker(ISTHMUS_METRICS_LISTEN=address) as process:
            assert process.wait(20) == 2
    assert f"ISTHMUS_METRICS_LISTEN: {address} cannot be bound: Address already in use" in world.log()
    with world.worker(ISTHMUS_METRICS_LISTEN="9100") as process:
        assert process.wait(20) == 2
    assert "ISTHMUS_METRICS_LISTEN: 9100 is not host:port" in world.log(1)


@SQLITE_ONLY
def test_a_worker_that_was_not_asked_to_serves_nothing(world: World) -> None:
    with world.worker() as process:
        world.until(lambda: _events(world, "registered"))
        listening = [c for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert listening == []


def test_an_outage_is_counted_once_however_often_the_database_is_asked() -> None:
    metrics = Metrics(heartbeat_age_s=lambda: 7.5)
    metrics.database(is_up=True, was_up=True)
    metrics.database(is_up=False, was_up=True)
    metrics.database(is_up=False, was_up=False)
    found = _of(metrics)
    assert (found["database_outages_total", ()], found["database_up", ()]) == (1, 0)
    metrics.database(is_up=True, was_up=False)
    found = _of(metrics)
    assert (found["database_outages_total", ()], found["database_up", ()]) == (1, 1)
    assert found["heartbeat_age_seconds", ()] == 7.5


def test_a_refused_end_is_stale_and_a_runner_that_was_killed_for_it_is_not_counted_again() -> None:
    metrics = Metrics(heartbeat_age_s=lambda: 0.0)
    error: dict[str, Any] = {"type": "Deadline", "message": "too long", "code": "deadline_exceeded"}
    metrics.ended("train", Failed(error, retry=True), None, 3.0)
    metrics.ended("train", Stopped("lost"), None, 3.0)
    metrics.ended("train", Stopped("interrupt"), "queued", 3.0)
    metrics.ended("train", Stopped("interrupt"), "cancelled", 3.0)
    found = _of(metrics)
    kind = ("kind", "train")
    assert found["stale_writes_total", (("what", "end"),)] == 1
    assert found["runner_deaths_total", (kind, ("why", "deadline"))] == 1
    assert found["put_back_total", (kind, ("why", "release"))] == 1
    assert found["jobs_ended_total", (kind, ("state", "cancelled"))] == 1
    assert found["job_seconds_count", (kind,)] == 4


def test_each_supervisor_counts_for_itself() -> None:
    one, other = Metrics(heartbeat_age_s=lambda: 0.0), Metrics(heartbeat_age_s=lambda: 0.0)
    one.claims.labels("train").inc()
    assert ("claims_total", (("kind", "train"),)) in _of(one)
    assert ("claims_total", (("kind", "train"),)) not in _of(other)
