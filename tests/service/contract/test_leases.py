from __future__ import annotations

from datetime import UTC, datetime, timedelta
from threading import Barrier, Thread
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from service.contract import leases, outcomes, picking, queue
from service.contract.dialects import Json
from service.contract.dialects import after as after_s
from service.contract.jobs import EmbedArgs, TrainArgs
from service.contract.modality import TextTokens
from service.contract.recipe import Pair, Recipe
from service.contract.tables import alias, dataset, job, job_event, job_input, model, worker
from service.contract.towers import AnyTower, Tower


def _train(dataset_id: str) -> TrainArgs:
    towers: dict[str, AnyTower] = {"text": Tower(tokens=TextTokens()), "note": Tower(tokens=TextTokens())}
    recipe = Recipe(towers=towers, pairs=[Pair(dataset=dataset_id, modalities=("note", "text"))])
    return TrainArgs(recipe=recipe)


def test_a_claim_holds_what_the_runner_needs(world: Any) -> None:
    world.worker()
    data, model_id = world.dataset(), world.model(alias="best")
    public_id = world.add(EmbedArgs(model="best", dataset=data, modality="text"))
    claim = world.take()
    assert (claim.public_id, claim.tenant_id, claim.kind, claim.epoch, claim.attempt) == (public_id, "t", "embed", 1, 1)
    assert claim.inputs == {
        "best": {"artifact": f"models/{model_id}/1", "digest": "e" * 64, "id": model_id, "kind": "model"},
        data: {"artifact": f"datasets/{data}/1", "digest": "d" * 64, "id": data, "kind": "dataset"},
    }
    row = world.row(public_id)
    assert (row.state, row.worker_id) == ("running", "w1")
    assert abs(row.deadline_at - row.started_at - timedelta(seconds=claim.deadline_s)) < timedelta(seconds=1)
    assert [event.type for event in world.rows(job_event)] == ["queued", "started"]


def test_a_job_is_claimed_once_however_many_ask(world: Any) -> None:
    num_workers, num_jobs = 4, 24
    jobs = [world.ingest() for _ in range(num_jobs)]
    taken: list[str] = []
    barrier = Barrier(num_workers)

    def work(name: str) -> None:
        barrier.wait()
        while claims := world.claim(name):
            taken.extend(claim.public_id for claim in claims)

    threads = [Thread(target=work, args=(world.worker(f"w{index}"),)) for index in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(jobs)
    assert {row.lease_epoch for row in world.rows(job)} == {1}


def test_claims_keep_to_the_lane_and_to_known_kinds(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    assert world.claim(lane="train") == []
    assert leases.claim(world.engine, worker_id="w1", lane="bulk", kinds=["embed"], ttl_s=20) == []
    assert world.row(public_id).state == "queued"


def test_a_worker_that_is_unknown_silent_or_draining_gets_nothing(world: Any) -> None:
    world.ingest()
    assert world.claim("nobody") == []
    world.silence(world.worker("silent"))
    assert world.claim("silent") == []
    leases.drain(world.engine, world.worker("draining"))
    assert world.claim("draining") == []
    assert len(world.claim(world.worker("well"))) == 1


def test_a_job_whose_inputs_are_gone_fails_for_good_and_the_next_is_taken(world: Any) -> None:
    world.worker()
    data, model_id = world.dataset(), world.model()
    broken = world.add(EmbedArgs(model=model_id, dataset=data, modality="text"), priority=0)
    world.execute(sa.update(model).values(deleted_at=datetime.now(UTC)))
    following = world.ingest()
    assert world.take().public_id == following
    row = world.row(broken)
    assert row.state == "failed"
    assert row.error["code"] == "model_not_found"
    assert model_id in row.error["message"]


def test_a_job_that_this_version_cannot_read_is_left_to_a_newer_one_until_its_attempts_are_used_up(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    broken = {"kind": "ingest", "dataset": world.row(public_id).args["dataset"], "from_the_future": 1}
    world.execute(sa.update(job).values(args=broken, max_attempts=2))
    assert world.claim() == []
    row = world.row(public_id)
    assert (row.state, row.error["code"]) == ("scheduled", "args_unreadable")
    assert (row.run_at - datetime.now(UTC)).total_seconds() > 30
    world.execute(sa.update(job).values(state="queued"))
    assert world.claim() == []
    row = world.row(public_id)
    assert (row.state, row.error["code"]) == ("failed", "args_unreadable")
    assert world.rows(dataset)[0].state == "failed"


def test_an_alias_is_resolved_at_the_start_and_what_it_names_is_recorded(world: Any) -> None:
    world.worker()
    world.model(alias="best")
    world.add(EmbedArgs(model="best", dataset=world.dataset(), modality="text"))
    newer = world.model()
    world.execute(sa.update(alias).values(model_id=newer))
    claim = world.take()
    assert claim.inputs["best"]["id"] == newer
    assert newer in {row.ref for row in world.rows(job_input)}


def test_checkpoints_are_models_and_a_train_job_resumes_from_its_own(world: Any) -> None:
    world.worker()
    data = world.dataset()
    train_id = world.add(_train(data))
    claim = world.take(lane="train")
    assert claim.resume == []
    saved = [outcomes.Saved(step, f"checkpoints/{train_id}/{step}-1/model", f"{step}", {}) for step in (5, 10)]
    assert outcomes.record(world.engine, claim, "w1", outcomes.Batch(checkpoints=saved))
    for ref, step in (("latest", 10), ("5", 5)):
        embed_id = world.add(EmbedArgs(model=f"{train_id}@{ref}", dataset=data, modality="text"))
        found = world.take().inputs[f"{train_id}@{ref}"]
        assert (found["id"], found["artifact"]) == (f"{train_id}@{step}", f"checkpoints/{train_id}/{step}-1/model")
        with world.engine.connect() as conn:
            refs = conn.execute(sa.select(job_input.c.ref).where(job_input.c.job_id == world.row(embed_id).id))
            assert train_id in refs.scalars().all()
    outcomes.fail(world.engine, claim, "w1", {"type": "Transient", "message": "again"}, retry=True, delay_s=0)
    world.make_due()
    assert world.take(lane="train").resume == [row.artifact for row in saved[::-1]]


def test_scheduled_jobs_are_promoted_when_they_are_due(world: Any) -> None:
    public_id = world.ingest(run_at=datetime.now(UTC) + timedelta(hours=1))
    assert leases.promote(world.engine) == 0
    world.execute(sa.update(job).values(run_at=after_s(sa.literal(-1.0, sa.Double))))
    assert leases.promote(world.engine) == 1
    assert world.row(public_id).state == "queued"


def test_a_heartbeat_tells_a_worker_that_it_was_declared_dead(world: Any) -> None:
    world.worker()
    assert leases.heartbeat(world.engine, "w1") == leases.Heartbeat(alive=True, draining=False)
    leases.drain(world.engine, "w1")
    assert leases.heartbeat(world.engine, "w1").draining
    leases.unregister(world.engine, "w1")
    assert not leases.heartbeat(world.engine, "w1").alive


def test_leases_show_cancel_requests(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    claim = world.take()
    assert leases.leases(world.engine, "w1") == {
        claim.id: leases.Lease(claim.id, claim.public_id, 1, 1, cancel_requested=False)
    }
    with world.engine.begin() as conn:
        queue.cancel(conn, "t", public_id)
    assert leases.leases(world.engine, "w1") == {
        claim.id: leases.Lease(claim.id, claim.public_id, 1, 1, cancel_requested=True)
    }


def test_the_jobs_of_a_silent_worker_are_put_back(world: Any) -> None:
    world.worker()
    lost, kept = world.ingest(), world.ingest()
    world.take()
    world.take(world.worker("w2"))
    world.silence("w1")
    assert leases.rescue(world.engine, ttl_s=20) == [(lost, "scheduled")]
    row = world.row(lost)
    assert (row.attempt, row.error["type"], row.error["worker"]) == (1, "worker_lost", "w1")
    assert world.row(kept).state == "running"
    assert [found.id for found in world.rows(worker)] == ["w2"]


def test_the_jobs_of_a_worker_without_a_row_are_put_back(world: Any) -> None:
    world.worker()
    lost = world.ingest()
    world.take()
    leases.unregister(world.engine, "w1")
    world.worker("w2")
    assert leases.rescue(world.engine, ttl_s=20) == [(lost, "scheduled")]


def test_a_worker_that_was_silent_but_not_rescued_goes_on(world: Any) -> None:
    world.worker()
    world.ingest()
    claim = world.take()
    world.silence("w1")
    assert leases.heartbeat(world.engine, "w1").alive
    assert leases.rescue(world.engine, ttl_s=20) == []
    assert outcomes.record(world.engine, claim, "w1", outcomes.Batch(events=[("note", {})]))


def test_a_job_that_kills_its_workers_fails_after_its_attempts(world: Any) -> None:
    public_id = world.ingest()
    for attempt in range(1, 6):
        world.take(world.worker(f"w{attempt}"))
        leases.unregister(world.engine, f"w{attempt}")
        ((_, state),) = leases.rescue(world.engine, ttl_s=20)
        assert state == ("scheduled" if attempt < 5 else "failed")
        world.make_due()
    assert world.row(public_id).lease_epoch == 5
    assert world.rows(dataset)[0].state == "failed"


def test_a_rescued_job_that_was_to_be_cancelled_is_cancelled(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    world.take()
    with world.engine.begin() as conn:
        queue.cancel(conn, "t", public_id)
    assert leases.forget(world.engine, ["w1"]) == [(public_id, "cancelled")]


def test_a_job_far_past_its_deadline_is_put_back_though_its_worker_lives(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    world.take()
    world.execute(sa.update(job).values(deadline_at=after_s(sa.literal(-31.0, sa.Double))))
    assert leases.rescue(world.engine, ttl_s=20) == [(public_id, "scheduled")]


def test_a_lease_names_the_request_that_submitted_its_job(world: Any) -> None:
    world.worker()
    world.ingest(request_id="req_first")
    claim = world.take()
    assert (claim.request_id, leases.leases(world.engine, "w1")[claim.id].request_id) == ("req_first", "req_first")
    assert outcomes.release(world.engine, claim, "w1") == "queued"
    assert world.take().request_id == "req_first"


def test_whoever_rescues_or_refuses_a_job_logs_its_attempt_epoch_and_request(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    world.worker()
    lost = world.ingest(request_id="req_a")
    world.take()
    world.silence("w1")
    leases.rescue(world.engine, ttl_s=20)
    assert _fields(caplog, "rescued") == [
        {"job": lost, "attempt": 1, "epoch": 1, "request_id": "req_a", "state": "scheduled", "from_worker": "w1"}
    ]
    world.worker("w2")
    gone = world.add(EmbedArgs(model=world.model(), dataset=world.dataset(), modality="text"), request_id="req_b")
    world.execute(sa.update(model).values(deleted_at=datetime.now(UTC)))
    assert world.claim("w2") == []
    (refused,) = _fields(caplog, "refused")
    assert {name: refused[name] for name in ("job", "attempt", "epoch", "request_id", "state")} == {
        "job": gone,
        "attempt": 1,
        "epoch": 1,
        "request_id": "req_b",
        "state": "failed",
    }
    assert refused["error"]


def _fields(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.getMessage() == event]


def test_neighbours_are_workers_of_the_same_boot_of_the_same_host(world: Any) -> None:
    world.worker("here", pid=11)
    world.worker("elsewhere", host="there", pid=12)
    world.worker("before", boot="earlier", pid=13)
    assert leases.neighbours(world.engine, host="here", boot="now") == {"here": 11}


def test_a_claim_walks_its_index_past_many_finished_jobs(world: Any) -> None:
    world.worker()
    world.ingest()
    finished = {
        "state": "succeeded",
        "finished_at": datetime.now(UTC),
        "tenant_id": "t",
        "lane": "bulk",
        "kind": "ingest",
        "fair_seq": 0,
        "deadline_s": 1,
        "args": {},
    }
    with world.engine.begin() as conn:
        conn.execute(sa.insert(job), [{**finished, "public_id": f"job_{index}"} for index in range(5_000)])
        told = sa.select(job.c.id, job.c.tenant_id, sa.literal(0), sa.literal("queued"), sa.literal({}, Json))
        conn.execute(sa.insert(job_event).from_select(["job_id", "tenant_id", "epoch", "type", "detail"], told))
    with world.engine.connect() as conn:
        conn.execute(sa.text("ANALYZE"))
        conn.commit()
    claim = picking._CLAIM_NOTED if world.engine.dialect.name == "postgresql" else picking._CLAIM
    for statement, index in (
        (claim[False, False], "job_claim"),
        (claim[False, True], "job_claim"),
        (claim[True, False], "job_fair"),
        (leases._PROMOTE, "job_due"),
        (leases._ORPHANS, "job_running|job_deadline"),
        (leases._LEASES, "job_running|job_deadline"),
    ):
        plan = _explain(world.engine, statement)
        assert any(name in plan for name in index.split("|")), plan
        assert "Seq Scan on job" not in plan, plan
        assert "SCAN job" not in plan.replace("SCAN job USING", ""), plan
    assert "job_prune" in _explain(world.engine, queue._PRUNE)


def _explain(engine: sa.Engine, statement: Any) -> str:
    params = {
        "me": "w1",
        "worker": "w1",
        "at_lane": "bulk",
        "kinds": ["ingest"],
        "num": 1,
        "minus_ttl_s": -20.0,
        "minus_age_s": -1e6,
    }
    sent: list[tuple[str, Any]] = []

    def listen(_conn: Any, _cursor: Any, sql: str, values: Any, _context: Any, _many: bool) -> None:
        sent.append((sql, values))

    with engine.connect() as conn:
        with conn.begin() as transaction:
            event.listen(conn, "before_cursor_execute", listen, once=True)
            conn.execute(statement, params)
            transaction.rollback()
        sql, values = sent[0]
        explain = "EXPLAIN" if engine.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN"
        return "\n".join(str(row[-1]) for row in conn.exec_driver_sql(f"{explain} {sql}", values))
