"""No tenant holds up another, and no priority holds up another for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import pytest
import sqlalchemy as sa

from service.contract import leases, queue
from service.contract.jobs import KINDS, IngestArgs
from service.contract.leases import Claim, WorkerInfo
from service.contract.outcomes import release
from service.contract.shares import set_share
from service.contract.tables import job
from worker.slot import OLDEST_EVERY, Slot

SLOTS: Final = 4


class Lane:
    """A lane, who puts jobs into it, and a worker that takes them out."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        leases.register(engine, WorkerInfo("w", ["bulk"], list(KINDS), "h", "b", 1, None, "cpu", "0"))

    def add(self, tenant: str, num: int = 1, **options: Any) -> list[str]:
        with self.engine.begin() as conn:
            return [
                queue.enqueue(conn, tenant=tenant, args=IngestArgs(dataset="ds_x", source="s"), **options)
                for _ in range(num)
            ]

    def claim(self, num: int, *, oldest: bool = False) -> list[Claim]:
        return leases.claim(self.engine, worker_id="w", lane="bulk", kinds=KINDS, ttl_s=1e6, limit=num, oldest=oldest)

    def take(self, num: int) -> list[str]:
        """Take jobs one after the other and return whose they are."""
        found: list[str] = []
        while len(found) < num and (claims := self.claim(min(20, num - len(found)))):
            found += [each.tenant_id for each in claims]
        return found

    def share(self, tenant: str, *, weight: int = 1, max_running: int | None = None) -> None:
        set_share(self.engine, tenant=tenant, lane="bulk", weight=weight, max_running=max_running, max_queued=None)

    def before(self, public_id: str) -> int:
        """Count the jobs that wait before this one in the fair order."""
        me = sa.select(job.c.fair_seq, job.c.id).where(job.c.public_id == public_id).subquery()
        earlier = sa.tuple_(job.c.fair_seq, job.c.id) < sa.tuple_(me.c.fair_seq, me.c.id)
        with self.engine.connect() as conn:
            return conn.execute(sa.select(sa.func.count()).where(job.c.state == "queued", earlier)).scalar_one()


@pytest.fixture
def lane(engine: sa.Engine) -> Lane:
    return Lane(engine)


def _flood(lane: Lane, num: int) -> None:
    for _ in range(num // 250):
        lane.add("flood", 250)
    assert lane.take(SLOTS) == ["flood"] * SLOTS
    lane.add("quiet")
    assert "quiet" in lane.take(SLOTS + 1)
    lane.add("quiet", 3)
    assert lane.take(2 * SLOTS).count("quiet") == 3


def test_a_flood_holds_up_another_tenants_job_for_no_more_than_the_slots(lane: Lane) -> None:
    _flood(lane, 1000)


@pytest.mark.slow
def test_a_flood_of_ten_thousand_holds_up_another_tenants_job_for_no_more_than_the_slots(lane: Lane) -> None:
    _flood(lane, 10_000)


def test_work_is_shared_by_weight(lane: Lane) -> None:
    lane.share("heavy", weight=3)
    lane.share("light", weight=1)
    lane.add("heavy", 200)
    lane.add("light", 200)
    taken = Counter(lane.take(200))
    assert 148 <= taken["heavy"] <= 152, taken


def test_work_is_shared_by_cost(lane: Lane) -> None:
    lane.add("dear", 20, cost=10)
    lane.add("cheap", 200)
    taken = Counter(lane.take(110))
    assert 9 <= taken["dear"] <= 11, taken  # as much work as a hundred cheap ones


def test_what_a_tenant_used_of_an_idle_lane_is_no_debt(lane: Lane) -> None:
    lane.add("busy", 300)
    lane.take(300)
    lane.add("other", 100)
    lane.add("busy", 50)
    assert 23 <= lane.take(50).count("busy") <= 27


def test_what_a_tenant_left_to_others_is_no_credit(lane: Lane) -> None:
    lane.add("idle")
    lane.take(1)
    lane.add("busy", 400)
    lane.take(300)
    lane.add("idle", 100)
    lane.add("new", 100)
    taken = Counter(lane.take(90))
    assert max(taken.values()) - min(taken.values()) <= 3, taken
    assert len(taken) == 3


def test_a_job_that_waits_for_its_tenants_cap_gives_no_credit_to_others(lane: Lane) -> None:
    lane.share("capped", max_running=1)
    lane.add("capped", 3)
    lane.add("busy", 200)
    assert Counter(lane.take(151)) == {"capped": 1, "busy": 150}
    lane.add("new", 50)
    taken = Counter(lane.take(50))
    assert 23 <= taken["new"] <= 27, taken


def test_a_cap_lets_everybody_else_go_on(lane: Lane) -> None:
    lane.share("capped", max_running=2)
    lane.add("capped", 100)
    lane.add("other", 10)
    first = lane.claim(20)
    assert Counter(each.tenant_id for each in first) == {"capped": 2, "other": 10}
    assert lane.claim(20) == []
    ended = next(each for each in first if each.tenant_id == "capped")
    assert release(lane.engine, ended, "w") == "queued"
    assert [each.id for each in lane.claim(20)] == [ended.id]


class Urgent:
    """An endless stream of urgent jobs, and slots that take them as supervisors do."""

    def __init__(self, lane: Lane, tenants: list[str]) -> None:
        self._lane = lane
        self._tenants = tenants
        self._slots = [Slot("bulk", preload=False, environment={}) for _ in range(SLOTS)]
        for tenant in tenants:
            lane.add(tenant, 3, priority=0)

    def starts(self) -> Iterator[str]:
        """Yield the jobs that start, with a new urgent one for each."""
        while True:
            for slot in self._slots:
                (claim,) = self._lane.claim(1, oldest=slot.wants_oldest)
                slot._num_started += 1
                self._lane.add(self._tenants[claim.id % len(self._tenants)], priority=0)
                yield claim.public_id

    def until(self, public_id: str, bound: int) -> int:
        """Count the jobs that start before this one."""
        for num, started in enumerate(self.starts()):
            if started == public_id:
                return num
            assert num < bound, f"{num} jobs started, and it is still waiting"
        raise AssertionError


@pytest.mark.parametrize("tenants", [["a"], ["a", "b", "c"]])
def test_an_endless_stream_of_urgent_jobs_holds_up_the_least_urgent_for_a_bounded_time(
    lane: Lane, tenants: list[str]
) -> None:
    urgent = Urgent(lane, tenants)
    for tenant in ("late", tenants[0]):
        (waiting,) = lane.add(tenant, priority=9)
        # Of each tenant that is to come, one more job may stand before it.
        bound = SLOTS * OLDEST_EVERY * (lane.before(waiting) + len(tenants) + 1)
        assert urgent.until(waiting, bound) > 0


def test_a_backlog_of_urgent_jobs_holds_up_the_least_urgent_for_a_bounded_time(lane: Lane) -> None:
    lane.add("a", 300, priority=0)
    (waiting,) = lane.add("b", priority=9)
    assert Urgent(lane, ["a"]).until(waiting, SLOTS * OLDEST_EVERY * (lane.before(waiting) + 2)) > 0


def test_urgent_jobs_start_first_otherwise(lane: Lane) -> None:
    for priority in (9, 5, 0, 5, 9, 0):
        lane.add("t", priority=priority)
    claims = lane.claim(6)
    with lane.engine.connect() as conn:
        urgency = dict(conn.execute(sa.select(job.c.id, job.c.priority)).all())
    assert [urgency[each.id] for each in claims] == [0, 0, 5, 5, 9, 9]
