from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract import leases, outcomes, shares
from service.contract.jobs import KINDS
from service.contract.tables import job_event


def _cap(world: Any, tenant: str, max_running: int | None) -> None:
    shares.set_share(world.engine, tenant=tenant, lane="bulk", weight=1, max_running=max_running, max_queued=None)


def test_a_tenant_runs_no_more_than_its_cap_and_others_pass_it_by(world: Any) -> None:
    world.worker()
    for _ in range(4):
        world.ingest("capped")
    for _ in range(2):
        world.ingest("free")
    _cap(world, "capped", 2)
    claims = world.claim(limit=6)
    assert sorted(claim.tenant_id for claim in claims) == ["capped", "capped", "free", "free"]
    assert world.claim(limit=6) == []
    ended = next(claim for claim in claims if claim.tenant_id == "capped")
    outcomes.release(world.engine, ended, "w1")
    assert [claim.tenant_id for claim in world.claim(limit=6)] == ["capped"]


def test_a_cap_of_none_running_holds_everything_back_until_it_is_lifted(world: Any) -> None:
    world.worker()
    world.ingest("t")
    _cap(world, "t", 0)
    assert world.claim() == []
    _cap(world, "t", None)
    assert len(world.claim()) == 1


def test_a_cap_counts_its_own_lane_only(world: Any) -> None:
    world.worker()
    world.ingest("t")
    shares.set_share(world.engine, tenant="t", lane="train", weight=1, max_running=0, max_queued=None)
    assert len(world.claim()) == 1


@pytest.mark.parametrize("limit", [1, 3])
def test_claims_at_the_same_time_keep_to_a_cap(world: Any, limit: int) -> None:
    for index in range(6):
        world.worker(f"w{index}")
    for _ in range(20):
        world.ingest("t")
    _cap(world, "t", 3)
    start, taken = threading.Barrier(6), list[Any]()

    def work(name: str) -> None:
        start.wait()
        for _ in range(3):
            taken.extend(leases.claim(world.engine, worker_id=name, lane="bulk", kinds=KINDS, ttl_s=20.0, limit=limit))

    threads = [threading.Thread(target=work, args=(f"w{index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len({claim.id for claim in taken}) == 3


def test_a_claim_for_the_oldest_leaves_the_priority_out(world: Any) -> None:
    world.worker()
    patient = world.ingest(priority=9)
    urgent = [world.ingest(priority=0) for _ in range(3)]
    assert world.take().public_id == urgent[0]
    (claim,) = leases.claim(world.engine, worker_id="w1", lane="bulk", kinds=KINDS, ttl_s=20.0, oldest=True)
    assert claim.public_id == patient
    assert [world.take().public_id for _ in range(2)] == urgent[1:]


def test_claiming_many_keeps_their_order_and_notes_each_start(world: Any) -> None:
    world.worker()
    expected = [world.ingest() for _ in range(5)]
    assert [claim.public_id for claim in world.claim(limit=5)] == expected
    with world.engine.connect() as conn:
        events = conn.execute(sa.select(job_event.c.detail).where(job_event.c.type == "started")).scalars().all()
    assert events == [{"attempt": 1, "worker": "w1"}] * 5
