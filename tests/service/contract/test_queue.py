from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from threading import Barrier, Event, Thread
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract import outcomes, queue
from service.contract.dialects import now
from service.contract.errors import Conflict, Invalid, Malformed, NotFound, TooLarge, TooMany
from service.contract.jobs import EmbedArgs, IngestArgs, TrainArgs
from service.contract.tables import dataset, idempotency, job, job_event, job_input, model, tenant_queue


def _cancel(world: Any, public_id: str, tenant: str = "t") -> str:
    with world.engine.begin() as conn:
        return queue.cancel(conn, tenant, public_id)


def _retry(world: Any, public_id: str, tenant: str = "t") -> str:
    with world.engine.begin() as conn:
        return queue.retry(conn, tenant, public_id)


def test_a_job_is_queued_with_the_policy_of_its_kind(world: Any) -> None:
    row = world.row(world.ingest(name="n", priority=3, meta={"a": [1, None]}))
    assert (row.state, row.lane, row.kind, row.max_attempts, row.attempt, row.lease_epoch) == (
        "queued",
        "bulk",
        "ingest",
        5,
        0,
        0,
    )
    assert (row.name, row.priority, row.meta) == ("n", 3, {"a": [1, None]})
    assert abs(row.created_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert [event.type for event in world.rows(job_event)] == ["queued"]


def test_what_was_left_out_is_null_in_sql(world: Any) -> None:
    world.ingest()
    with world.engine.connect() as conn:
        assert conn.scalar(sa.text("SELECT count(*) FROM job WHERE meta IS NULL AND error IS NULL")) == 1


def test_an_enqueue_that_is_rolled_back_leaves_nothing(world: Any) -> None:
    args = IngestArgs(dataset=world.dataset(state="ingesting"), source="s")
    with world.engine.connect() as conn, conn.begin() as transaction:
        queue.enqueue(conn, tenant="t", args=args)
        transaction.rollback()
    assert world.rows(job) == []
    assert world.rows(tenant_queue) == []


def test_args_over_the_limit_are_refused(world: Any) -> None:
    args = IngestArgs(dataset="ds_x", source="s" * 70_000)
    with pytest.raises(TooLarge, match="65,536"):
        world.add(args)
    with pytest.raises(TooLarge, match="metadata"):
        world.ingest(meta={"a": "b" * 70_000})
    assert world.rows(job) == []


def test_a_time_without_a_zone_and_a_priority_out_of_range_are_refused(world: Any) -> None:
    with pytest.raises(Invalid, match="time zone"):
        world.ingest(run_at=datetime(2030, 1, 1))  # noqa: DTZ001
    with pytest.raises(Invalid, match="priority"):
        world.ingest(priority=10)


def test_a_job_for_later_is_scheduled_and_one_for_the_past_is_queued(world: Any) -> None:
    later = world.ingest(run_at=datetime.now(UTC) + timedelta(hours=1))
    earlier = world.ingest(run_at=datetime.now(UTC) - timedelta(hours=1))
    assert (world.row(later).state, world.row(earlier).state) == ("scheduled", "queued")


def test_inputs_are_recorded_and_must_be_readable_by_the_tenant(world: Any) -> None:
    ready = world.dataset()
    with pytest.raises(NotFound, match="model"):
        world.add(EmbedArgs(model="nothing", dataset=ready, modality="text"))
    model_id = world.model("t", alias="best")
    job_id = world.add(EmbedArgs(model="best", dataset=ready, modality="text"))
    assert sorted(row.ref for row in world.rows(job_input)) == sorted([ready, model_id])
    assert world.row(job_id).args["model"] == "best"
    with pytest.raises(NotFound):
        world.add(EmbedArgs(model=model_id, dataset=world.dataset("other"), modality="text"))
    with pytest.raises(NotFound):
        world.add(EmbedArgs(model=model_id, dataset=world.dataset("other"), modality="text"), tenant="other")
    with pytest.raises(Conflict, match="ingested"):
        world.add(EmbedArgs(model="best", dataset=world.dataset(state="ingesting"), modality="text"))
    with pytest.raises(Invalid, match="could not"):
        world.add(EmbedArgs(model="best", dataset=world.dataset(state="failed"), modality="text"))


def test_what_a_job_reads_cannot_be_deleted_until_it_is_recorded(world: Any) -> None:
    found, name = world.dataset(), world.model(alias="best")
    for table, ref in ((dataset, found), (model, name)):
        gone = Event()

        def delete(table: sa.Table = table, ref: str = ref, gone: Event = gone) -> None:
            world.execute(sa.update(table).where(table.c.id == ref).values(deleted_at=now()))
            gone.set()

        with world.engine.begin() as conn:
            queue.enqueue(conn, tenant="t", args=EmbedArgs(model="best", dataset=found, modality="text"))
            thread = Thread(target=delete)
            thread.start()
            assert not gone.wait(0.3)
        thread.join()
        world.execute(sa.update(table).values(deleted_at=None))


def test_a_unique_key_gives_one_job_while_it_is_unfinished(world: Any) -> None:
    first = world.ingest(unique_key="k")
    assert world.ingest(unique_key="k") == first
    assert world.ingest(unique_key="other") != first
    assert world.ingest("another tenant", unique_key="k") != first
    _cancel(world, first)
    assert world.ingest(unique_key="k") != first


def test_a_unique_key_gives_one_job_under_a_race(world: Any) -> None:
    num, found = 8, list[str]()
    barrier = Barrier(num)
    args = IngestArgs(dataset=world.dataset(state="ingesting"), source="s")

    def add() -> None:
        barrier.wait()
        found.append(world.add(args, unique_key="k"))

    threads = [Thread(target=add) for _ in range(num)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == num
    assert len(set(found)) == 1
    assert len(world.rows(job)) == 1


def test_a_waiting_job_is_cancelled_at_once(world: Any) -> None:
    public_id = world.ingest()
    assert _cancel(world, public_id) == "cancelled"
    row = world.row(public_id)
    assert row.finished_at is not None
    assert [found.state for found in world.rows(dataset)] == ["failed"]
    world.worker()
    assert world.claim() == []


def test_a_running_job_is_asked_to_stop(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    claim = world.take()
    assert _cancel(world, public_id) == "running"
    asked_at = world.row(public_id).cancel_requested_at
    assert _cancel(world, public_id) == "running"
    assert world.row(public_id).cancel_requested_at == asked_at
    assert outcomes.cancelled(world.engine, claim, "w1") == "cancelled"


def test_a_finished_job_cannot_be_cancelled(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    outcomes.fail(world.engine, world.take(), "w1", {"type": "Permanent", "message": "no"}, retry=False)
    with pytest.raises(Malformed) as refused:
        _cancel(world, public_id)
    assert refused.value.code == "job_already_finished"
    assert "failed" in refused.value.message


def test_another_tenants_job_is_not_there(world: Any) -> None:
    public_id = world.ingest()
    for move in (_cancel, _retry):
        with pytest.raises(NotFound):
            move(world, public_id, "other")
        with pytest.raises(NotFound):
            move(world, "job_unknown")
    assert world.row(public_id).state == "queued"


def test_a_retry_gives_all_attempts_back_and_keeps_the_epoch(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    claim = world.take()
    outcomes.fail(world.engine, claim, "w1", {"type": "Permanent", "message": "no"}, retry=False)
    assert world.rows(dataset)[0].state == "failed"
    assert _retry(world, public_id) == "queued"
    row = world.row(public_id)
    assert (row.state, row.attempt, row.lease_epoch, row.error, row.finished_at) == ("queued", 0, 1, None, None)
    assert world.rows(dataset)[0].state == "ingesting"
    assert world.take().epoch == 2


def test_only_a_failed_or_cancelled_job_can_be_retried(world: Any) -> None:
    public_id = world.ingest()
    with pytest.raises(Malformed) as refused:
        _retry(world, public_id)
    assert refused.value.code == "job_not_retryable"
    _cancel(world, public_id)
    assert _retry(world, public_id) == "queued"
    assert world.row(public_id).cancel_requested_at is None


def test_a_retry_whose_unique_key_was_taken_is_a_conflict(world: Any) -> None:
    first = world.ingest(unique_key="k")
    _cancel(world, first)
    world.ingest(unique_key="k")
    with pytest.raises(Conflict):
        _retry(world, first)
    assert world.row(first).state == "cancelled"


def test_one_job_of_a_flooding_tenant_runs_before_a_quiet_tenants(world: Any) -> None:
    world.worker()
    with world.engine.begin() as conn:
        args = IngestArgs(dataset=world.dataset_in(conn, "a"), source="s")
        for _ in range(100):
            queue.enqueue(conn, tenant="a", args=args)
    quiet = world.ingest("b")
    order = [claim.tenant_id for claim in world.claim(limit=10)]
    assert order.index("b") == 1
    assert world.row(quiet).state == "running"


def test_neither_an_idle_past_nor_a_busy_one_is_held_against_a_tenant(world: Any) -> None:
    world.worker()
    for _ in range(20):
        world.ingest("a")
    world.claim(limit=20)
    for _ in range(10):
        world.ingest("d")
    world.ingest("a")
    assert [claim.tenant_id for claim in world.claim(limit=12)].index("a") == 1


def test_weights_and_costs_share_the_work(world: Any) -> None:
    world.worker()
    world.execute(
        sa.insert(tenant_queue).values(
            [{"tenant_id": "heavy", "lane": "bulk", "weight": 3}, {"tenant_id": "light", "lane": "bulk", "weight": 1}]
        )
    )
    for _ in range(12):
        world.ingest("heavy")
        world.ingest("light")
    taken = [claim.tenant_id for claim in world.claim(limit=12)]
    assert 8 <= taken.count("heavy") <= 10


def test_a_dear_job_counts_for_more(world: Any) -> None:
    world.worker()
    for _ in range(3):
        world.ingest("dear", cost=10)
    for _ in range(30):
        world.ingest("cheap")
    taken = [claim.tenant_id for claim in world.claim(limit=22)]
    assert 2 <= taken.count("dear") <= 3


def test_a_training_counts_by_the_pairs_it_learns(world: Any) -> None:
    world.worker()
    data = {tenant: world.dataset(tenant) for tenant in ("long", "short")}

    def train(tenant: str, steps: int) -> str:
        tokens = {"kind": "discrete", "vocab": 4, "max_length": 2}
        args = TrainArgs.model_validate(
            {
                "recipe": {
                    "towers": {name: {"tokens": tokens} for name in ("a", "b")},
                    "pairs": [{"dataset": data[tenant], "modalities": ["a", "b"]}],
                    "budget": {"steps": steps, "batch_size": 100},
                }
            }
        )
        return world.add(args, tenant)

    for _ in range(2):
        train("long", 1000)
    for _ in range(4):
        train("short", 250)
    order = [claim.tenant_id for claim in world.claim(lane="train", limit=6)]
    assert order[-1] == "long"
    assert order.count("short") == 4


def test_priority_is_strict_within_a_lane(world: Any) -> None:
    world.worker()
    world.ingest(priority=9)
    urgent = world.ingest(priority=0)
    assert world.take().public_id == urgent


def test_a_tenant_with_its_limit_of_jobs_waiting_is_refused(world: Any) -> None:
    world.execute(sa.insert(tenant_queue).values(tenant_id="t", lane="bulk", max_queued=2))
    world.ingest()
    world.ingest()
    with pytest.raises(TooMany, match="2"):
        world.ingest()
    assert len(world.rows(job)) == 2


def test_pruning_takes_finished_jobs_and_what_hangs_on_them(world: Any) -> None:
    world.worker()
    done, waiting = world.ingest(), world.ingest()
    _cancel(world, done)
    assert queue.prune(world.engine, older_than_s=3600) == 0
    time.sleep(0.001)
    assert queue.prune(world.engine, older_than_s=0) == 1
    assert [row.public_id for row in world.rows(job)] == [waiting]
    assert len(world.rows(job_event)) == 1


def test_pruning_leaves_a_job_whose_checkpoint_an_unfinished_job_reads(world: Any) -> None:
    world.worker()
    read, reader = world.ingest(), world.ingest()
    _cancel(world, read)
    reader_id = next(row.id for row in world.rows(job) if row.public_id == reader)
    world.execute(sa.insert(job_input).values(job_id=reader_id, ref=read, tenant_id="t"))
    time.sleep(0.001)
    assert queue.prune(world.engine, older_than_s=0) == 0
    _cancel(world, reader)
    time.sleep(0.001)
    assert queue.prune(world.engine, older_than_s=0) == 2


def test_idempotency_keys_go_after_a_day(world: Any) -> None:
    world.execute(sa.insert(idempotency).values(tenant_id="t", key="k", request_sha256="0"))
    assert queue.prune_idempotency(world.engine) == 0
    time.sleep(0.001)
    assert queue.prune_idempotency(world.engine, older_than_s=0) == 1
