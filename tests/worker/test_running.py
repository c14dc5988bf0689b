from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from service.contract.jobs import IngestArgs
from service.contract.leases import Claim
from service.contract.outcomes import Batch
from service.contract.tables import job_progress
from tests.supervisors import World
from worker import running as running_module
from worker.child import Child
from worker.running import Running

ROOT = Path(__file__).resolve().parents[2]
SAVED = {"step": 1, "artifact": "checkpoints/job_x/1-1", "digest": "d", "metrics": {}}
REPORTS: list[dict[str, Any]] = [
    {"progress": {"done": 1, "total": None, "eta_s": None}},
    {"metric": {"step": 1, "values": {"loss": 1.0}}},
    {"event": {"type": "seen", "detail": {}}},
    {"checkpoint": SAVED},
]


@pytest.fixture
def running() -> Iterator[Running]:
    claim = Claim(
        id=1,
        public_id="job_x",
        tenant_id="t",
        lane="bulk",
        kind="ingest",
        epoch=1,
        attempt=1,
        max_attempts=5,
        deadline_s=60,
        args=IngestArgs(dataset="ds_x", source="s"),
        inputs={},
        resume=[],
    )
    child = Child(preload=False, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    yield Running(claim, child)
    child.close()


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: next(iter(report)))
def test_whatever_a_runner_reports_is_written_at_most_once_a_second(running: Running, report: dict[str, Any]) -> None:
    now = time.monotonic()
    assert not running.is_due(now + 5)  # nothing was said
    running._take(report)
    assert running.is_due(now)  # the first at once
    running.batch, running.written_at = Batch(), now  # as the supervisor does when it writes
    running._take(report)
    assert not running.is_due(now + 0.99)
    assert running.is_due(now + 1.0)


def test_the_end_waits_for_nothing(running: Running) -> None:
    now = time.monotonic()
    running._take(REPORTS[0])
    running.batch, running.written_at = Batch(), now
    running._take({"cancelled": True})
    assert running.is_due(now)


def test_what_waits_for_the_database_is_bounded_and_the_newest_is_kept(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_module, "_MAX_EVENTS", 3)
    monkeypatch.setattr(running_module, "_MAX_METRICS", 3)
    for number in range(10):
        running._take({"event": {"type": "seen", "detail": {"number": number}}})
        running._take({"metric": {"step": number, "values": {"loss": 1.0}}})
        running._take({"progress": {"done": number, "total": None, "eta_s": None}})
    assert [detail["number"] for _, detail in running.batch.events] == [7, 8, 9]
    assert [step for step, _ in running.batch.metrics] == [7, 8, 9]
    assert running.batch.progress == (9, None, None)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_job_that_reports_five_times_a_second_is_written_once_a_second(world: World) -> None:
    feed = world.feed()
    with world.worker():
        public_id = world.ingest(feed.source)
        world.until_it_reads(public_id)
        written: list[datetime] = []
        dones: list[int] = []

        def saw_four() -> bool:
            (row,) = world.rows(job_progress)
            if not written or row.updated_at != written[-1]:
                written.append(row.updated_at)
                dones.append(row.done)
            return len(written) == 4

        world.until(saw_four, timeout_s=30)
        feed.end()
        world.until_state(public_id, "succeeded")
    gaps_s = [(later - earlier).total_seconds() for earlier, later in pairwise(written)]
    assert min(gaps_s) > 0.9, gaps_s
    assert dones == sorted(dones)
