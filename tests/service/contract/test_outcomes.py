from __future__ import annotations

import math
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from service.contract import leases, outcomes, queue
from service.contract.errors import TooLarge
from service.contract.jobs import (
    EmbedArgs,
    EmbedResult,
    EvaluateArgs,
    EvaluateResult,
    IngestResult,
    Reject,
    TrainArgs,
    TrainResult,
)
from service.contract.modality import TextTokens
from service.contract.outcomes import Batch, Saved
from service.contract.recipe import Pair, Recipe
from service.contract.tables import (
    alias,
    checkpoint,
    dataset,
    embedding_set,
    job_event,
    job_progress,
    job_result,
    metric,
    model,
)
from service.contract.towers import AnyTower, Tower

ERROR = {"type": "Permanent", "message": "no", "code": None}


def _ingested(artifact: str = "datasets/ds_x/1", rejects: list[Reject] | None = None) -> IngestResult:
    return IngestResult(
        artifact=artifact,
        num_samples=3,
        num_rejected=0,
        rejects=rejects or [],
        modalities={"text": "text"},
        splits={"train": 3},
        labels=[],
        statistics={"text": {"mean_bytes": 4.5}},
        digest="a" * 64,
        num_bytes=12,
    )


def _trained(model_id: str) -> TrainResult:
    return TrainResult(
        artifact=f"models/{model_id}/1",
        modalities=["note", "text"],
        dimensions=8,
        logit_scales={"note+text": 10.0},
        metrics={"loss": 0.5},
        digest="b" * 64,
        num_bytes=1,
    )


def _train(data: str, name: str | None) -> TrainArgs:
    towers: dict[str, AnyTower] = {"text": Tower(tokens=TextTokens()), "note": Tower(tokens=TextTokens())}
    recipe = Recipe(towers=towers, pairs=[Pair(dataset=data, modalities=("note", "text"))])
    return TrainArgs(recipe=recipe, name=name)


def test_finishing_an_ingest_job_makes_its_data_set_ready(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    assert outcomes.finish(world.engine, world.take(), "w1", _ingested()) == "succeeded"
    row = world.row(public_id)
    assert (row.state, row.worker_id, row.deadline_at, row.error) == ("succeeded", None, None, None)
    (made,) = world.rows(dataset)
    assert (made.state, made.artifact, made.digest, made.info["num_samples"]) == (
        "ready",
        "datasets/ds_x/1",
        "a" * 64,
        3,
    )
    (result,) = world.rows(job_result)
    assert (result.epoch, result.body["splits"]) == (1, {"train": 3})


def test_finishing_a_train_job_makes_a_model_that_takes_the_alias_over(world: Any) -> None:
    world.worker()
    data, former = world.dataset(), world.model(alias="best")
    for model_id in ("model_a", "model_b"):
        job_id = world.add(_train(data, "best"))
        assert outcomes.finish(world.engine, world.take(lane="train"), "w1", _trained(model_id)) == "succeeded"
        (made,) = [row for row in world.rows(model) if row.id == model_id]
        assert (made.tenant_id, made.job_id, made.artifact) == ("t", job_id, f"models/{model_id}/1")
        assert [row.model_id for row in world.rows(alias)] == [model_id]
    assert former in {row.id for row in world.rows(model)}


def test_finishing_embed_and_evaluate_jobs(world: Any) -> None:
    world.worker()
    data, model_id = world.dataset(), world.model()
    embed_id = world.add(EmbedArgs(model=model_id, dataset=data, modality="text"))
    result = EmbedResult(
        artifact="embeddings/emb_x/1",
        model=model_id,
        model_digest="e" * 64,
        modality="text",
        num_vectors=3,
        dimensions=8,
        num_bytes=96,
    )
    assert outcomes.finish(world.engine, world.take(), "w1", result) == "succeeded"
    (made,) = world.rows(embedding_set)
    assert (made.id, made.job_id) == ("emb_x", embed_id)
    world.add(EvaluateArgs(model=model_id, datasets=[data]))
    report = EvaluateResult(artifact="reports/job_x/1", summary={"recall@1": 0.5})
    assert outcomes.finish(world.engine, world.take(), "w1", report) == "succeeded"


def test_a_row_that_cannot_be_written_leaves_the_job_running(world: Any) -> None:
    world.worker()
    data = world.dataset()
    world.add(_train(data, None))
    taken = world.model()
    claim = world.take(lane="train")
    with pytest.raises(IntegrityError):
        outcomes.finish(world.engine, claim, "w1", _trained(taken))
    assert world.row(claim.public_id).state == "running"
    assert world.rows(job_result) == []


def test_an_end_whose_answer_was_lost_can_be_said_again(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    claim = world.take()
    assert [outcomes.finish(world.engine, claim, "w1", _ingested()) for _ in range(2)] == ["succeeded"] * 2
    assert outcomes.fail(world.engine, claim, "w1", {"type": "x", "message": "m"}, retry=True) is None
    assert world.row(public_id).state == "succeeded"
    assert len(world.rows(job_result)) == 1
    assert [row.type for row in world.rows(job_event)] == ["queued", "started", "succeeded"]


def test_a_stale_worker_is_refused_before_and_after_the_job_is_claimed_again(world: Any) -> None:
    world.worker()
    world.ingest()
    stale = world.take()
    leases.forget(world.engine, ["w1"])
    world.make_due()

    def refused() -> None:
        for worker in ("w1", "w2"):
            assert outcomes.finish(world.engine, stale, worker, _ingested()) is None
            assert outcomes.fail(world.engine, stale, worker, ERROR, retry=True) is None
            assert outcomes.cancelled(world.engine, stale, worker) is None
            assert outcomes.release(world.engine, stale, worker) is None
            assert outcomes.snooze(world.engine, stale, worker, 1.0) is None
            assert not outcomes.record(world.engine, stale, worker, Batch(progress=(1, 2, None)))

    refused()
    world.worker("w2")
    current = world.take("w2")
    assert current.epoch == 2
    refused()
    assert world.rows(job_result) == []
    assert world.rows(job_progress) == []
    assert outcomes.finish(world.engine, current, "w2", _ingested()) == "succeeded"
    refused()
    assert len(world.rows(job_result)) == 1


def test_the_same_worker_is_refused_under_an_old_epoch(world: Any) -> None:
    world.worker()
    world.ingest()
    old = world.take()
    outcomes.release(world.engine, old, "w1")
    new = world.take()
    assert outcomes.finish(world.engine, old, "w1", _ingested()) is None
    assert outcomes.finish(world.engine, new, "w1", _ingested()) == "succeeded"


def test_a_job_that_was_to_be_cancelled_never_succeeds(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    claim = world.take()
    with world.engine.begin() as conn:
        queue.cancel(conn, "t", public_id)
    assert outcomes.finish(world.engine, claim, "w1", _ingested()) == "cancelled"
    assert world.rows(job_result) == []
    assert world.rows(dataset)[0].state == "failed"


@pytest.mark.parametrize("way", ["fail", "release", "snooze"])
def test_a_cancel_request_wins_over_every_other_way_out(world: Any, way: str) -> None:
    world.worker()
    public_id = world.ingest()
    claim = world.take()
    with world.engine.begin() as conn:
        queue.cancel(conn, "t", public_id)
    match way:
        case "fail":
            state = outcomes.fail(world.engine, claim, "w1", ERROR, retry=True)
        case "release":
            state = outcomes.release(world.engine, claim, "w1")
        case _:
            state = outcomes.snooze(world.engine, claim, "w1", 5.0)
    assert state == "cancelled"
    assert world.row(public_id).state == "cancelled"


def test_a_transient_failure_uses_attempts_up_with_growing_delays(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    states: list[str | None] = []
    for attempt in range(1, 6):
        claim = world.take()
        assert claim.attempt == attempt
        states.append(outcomes.fail(world.engine, claim, "w1", ERROR | {"type": "Transient"}, retry=True))
        row = world.row(public_id)
        assert row.error["type"] == "Transient"
        world.make_due()
    assert states == ["scheduled"] * 4 + ["failed"]
    retries = [event.detail for event in world.rows(job_event) if event.type == "retrying"]
    assert [detail["attempt"] for detail in retries] == [1, 2, 3, 4]
    assert all(0 <= detail["delay_s"] <= 2 ** detail["attempt"] for detail in retries)


def test_the_delay_is_jittered_and_bounded() -> None:
    assert len({outcomes.backoff_s(3) for _ in range(20)}) == 20
    assert max(outcomes.backoff_s(60) for _ in range(50)) <= 300


def test_a_permanent_failure_is_not_tried_again(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    error = ERROR | {"traceback": "Traceback: line 1"}
    assert outcomes.fail(world.engine, world.take(), "w1", error, retry=False) == "failed"
    row = world.row(public_id)
    assert row.error == error
    assert row.finished_at is not None
    assert world.rows(dataset)[0].state == "failed"
    (event,) = [event for event in world.rows(job_event) if event.type == "failed"]
    assert event.detail == {"error": ERROR}


def test_a_snooze_and_a_release_do_not_count_as_attempts(world: Any) -> None:
    world.worker()
    public_id = world.ingest()
    assert outcomes.snooze(world.engine, world.take(), "w1", 60.0) == "scheduled"
    assert (world.row(public_id).attempt, world.row(public_id).state) == (0, "scheduled")
    world.make_due()
    behind = world.ingest()
    assert outcomes.release(world.engine, world.take(), "w1") == "queued"
    assert (world.row(public_id).attempt, world.row(public_id).lease_epoch) == (0, 2)
    assert world.take().public_id == public_id
    assert world.take().public_id == behind


def test_a_batch_is_written_whole(world: Any) -> None:
    world.worker()
    world.ingest()
    claim = world.take()
    first = Batch(
        progress=(1, 10, 9.0),
        events=[("note", {"a": 1}), ("note", {"a": 2})],
        metrics=[(1, {"loss": 2.0, "scale": 1.0}), (2, {"loss": math.nan})],
        checkpoints=[Saved(1, "checkpoints/j/1-1/model", "c" * 64, {"loss": 2.0})],
    )
    assert outcomes.record(world.engine, claim, "w1", first)
    again = Batch(
        progress=(2, None, None),
        metrics=[(1, {"loss": 1.5})],
        checkpoints=[Saved(1, "checkpoints/j/1-2/model", "d" * 64, {})],
    )
    assert outcomes.record(world.engine, claim, "w1", again)
    (progress,) = world.rows(job_progress)
    assert (progress.done, progress.total, progress.eta_s) == (2, None, None)
    assert [event.detail for event in world.rows(job_event) if event.type == "note"] == [{"a": 1}, {"a": 2}]
    assert {(row.step, row.name): row.value for row in world.rows(metric)} == {(1, "loss"): 1.5, (1, "scale"): 1.0}
    assert [row.digest for row in world.rows(checkpoint)] == ["d" * 64]


def test_checkpoints_that_a_later_attempt_passed_over_are_listed_no_more(world: Any) -> None:
    world.worker()
    public_id = world.add(_train(world.dataset(), None))
    claim = world.take(lane="train")
    saved = [Saved(step, f"checkpoints/j/{step}-1", str(step) * 64, {}) for step in (4, 6, 8)]
    assert outcomes.record(world.engine, claim, "w1", Batch(checkpoints=saved))
    assert {row.step for row in world.rows(checkpoint)} == {6, 8}
    assert outcomes.release(world.engine, claim, "w1") == "queued"
    again = world.take(lane="train")
    assert again.public_id == public_id
    assert again.resume == ["checkpoints/j/8-1", "checkpoints/j/6-1"]
    assert outcomes.record(world.engine, again, "w1", Batch(checkpoints=saved[1:2]))  # 8 could not be read
    assert [(row.step, row.epoch) for row in world.rows(checkpoint)] == [(6, 2)]


def test_text_that_no_json_column_holds_is_mended(world: Any) -> None:
    world.worker()
    world.ingest()
    rejects = [Reject(key="a\x00b", reason="\ud800")]
    assert outcomes.finish(world.engine, world.take(), "w1", _ingested(rejects=rejects)) == "succeeded"
    (result,) = world.rows(job_result)
    assert result.body["rejects"] == [{"key": "a\ufffdb", "reason": "?"}]
    world.ingest()
    error = {"type": "Permanent", "message": "\x00", "code": None, "loss": math.inf}
    claim = world.take()
    assert outcomes.fail(world.engine, claim, "w1", error, retry=False) == "failed"
    assert world.row(claim.public_id).error["loss"] is None


def test_a_result_over_the_limit_is_refused(world: Any) -> None:
    world.worker()
    world.ingest()
    claim = world.take()
    rejects = [Reject(key=str(index), reason="x" * 1000) for index in range(1100)]
    with pytest.raises(TooLarge):
        outcomes.finish(world.engine, claim, "w1", _ingested(rejects=rejects))
    assert world.row(claim.public_id).state == "running"
