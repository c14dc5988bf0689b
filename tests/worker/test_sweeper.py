from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from service.contract import leases, outcomes, queue
from service.contract.dialects import after, now
from service.contract.jobs import (
    KINDS,
    ComposeArgs,
    ComposeResult,
    EmbedArgs,
    EmbedResult,
    EvaluateArgs,
    EvaluateResult,
    IngestArgs,
    TrainArgs,
)
from service.contract.leases import WorkerInfo
from service.contract.tables import dataset, embedding_set, job, model
from worker.sweeper import Sweeper, sweep

if TYPE_CHECKING:
    from service.contract.artifacts import Store


@pytest.fixture
def publish(store: Store, tmp_path: Path) -> Any:
    """Publish a small artifact under a key."""

    def publish(key: str, kind: Any) -> str:
        folder = tmp_path / "made"
        folder.mkdir()
        (folder / "file").write_text(key)
        store.publish(folder, key, kind=kind, id=key.split("/")[1], body={})
        return key

    return publish


def _add(engine: sa.Engine, table: sa.Table, **values: Any) -> None:
    with engine.begin() as conn:
        conn.execute(sa.insert(table).values(tenant_id="t", **values))


def _drop(engine: sa.Engine, table: sa.Table, row: str) -> None:
    with engine.begin() as conn:
        conn.execute(sa.update(table).where(table.c.id == row).values(deleted_at=now()))


def test_what_a_row_refers_to_stays_and_the_rest_goes(engine: sa.Engine, store: Store, publish: Any) -> None:
    kept, lost = publish("models/model_a/3", "model"), publish("models/model_a/2", "model")
    _add(engine, model, id="model_a", artifact=kept, digest="d", info={})
    vectors = publish("embeddings/emb_a/1", "embeddings")
    _add(engine, embedding_set, id="emb_a", artifact=vectors, info={}, job_id="job_a")
    assert sweep(engine, store, older_than_s=-1) == [lost]
    assert store.exists(kept)
    _drop(engine, model, "model_a")
    _drop(engine, embedding_set, "emb_a")
    assert sorted(sweep(engine, store, older_than_s=-1)) == [vectors, kept]
    assert sweep(engine, store, older_than_s=-1) == []


def test_a_set_of_an_attempt_that_was_lost_goes_and_the_one_that_was_recorded_stays(
    engine: sa.Engine, store: Store, publish: Any
) -> None:
    """A worker was killed after it published and before it said so: the next attempt's set is the one with a row."""
    _add(engine, dataset, id="ds_e", name="n", source="s", state="ready", artifact="datasets/ds_e/1", digest="d")
    _add(engine, model, id="model_e", artifact="models/model_e/1", digest="d", info={})
    leases.register(engine, WorkerInfo("w", ["bulk"], list(KINDS), "h", "b", 1, None, "cpu", "0"))
    with engine.begin() as conn:
        job = queue.enqueue(conn, tenant="t", args=EmbedArgs(model="model_e", dataset="ds_e", modality="text"))
    suffix = job.partition("_")[2]
    (first,) = leases.claim(engine, worker_id="w", lane="bulk", kinds=KINDS, ttl_s=20)
    lost = publish(f"embeddings/emb_{suffix}/{first.epoch}", "embeddings")
    assert sweep(engine, store, older_than_s=-1) == []  # its job has not ended
    outcomes.release(engine, first, "w")
    (second,) = leases.claim(engine, worker_id="w", lane="bulk", kinds=KINDS, ttl_s=20)
    made = publish(f"embeddings/emb_{suffix}/{second.epoch}", "embeddings")
    result = EmbedResult(
        artifact=made,
        model="model_e",
        model_digest="d",
        modality="text",
        num_vectors=1,
        dimensions=1,
        num_bytes=1,
    )
    assert outcomes.finish(engine, second, "w", result)
    assert sweep(engine, store, older_than_s=-1) == [lost]
    assert store.exists(made)
    queue.prune(engine, older_than_s=-1)  # the job is forgotten, what it made is not
    assert sweep(engine, store, older_than_s=-1) == []
    _drop(engine, embedding_set, f"emb_{suffix}")
    assert sweep(engine, store, older_than_s=-1) == [made]


def test_what_is_young_stays(engine: sa.Engine, store: Store, publish: Any) -> None:
    publish("models/model_a/1", "model")
    assert sweep(engine, store) == []


def test_an_upload_stays_until_its_data_set_is_ready_or_deleted(engine: sa.Engine, store: Store) -> None:
    key, _, _ = store.write_upload("pairs.tar", [b"bytes"])
    _add(engine, dataset, id="ds_a", name="n", source=f"store:{key}", state="failed")
    assert sweep(engine, store, older_than_s=-1) == []
    with engine.begin() as conn:
        conn.execute(sa.update(dataset).values(state="ready", artifact="datasets/ds_a/1", digest="d"))
    assert sweep(engine, store, older_than_s=-1) == [key]
    assert not store.exists(key)


def test_what_an_unfinished_job_may_still_record_stays(engine: sa.Engine, store: Store, publish: Any) -> None:
    _add(engine, dataset, id="ds_b", name="n", source="s", state="ready", artifact="datasets/ds_b/1", digest="d")
    _add(engine, dataset, id="ds_c", name="n", source="s", state="ingesting")
    tokens = {"kind": "continuous", "dim": 1, "max_length": 1}
    recipe = {
        "towers": {name: {"tokens": tokens} for name in ("a", "b")},
        "pairs": [{"dataset": "ds_b", "modalities": ["a", "b"]}],
    }
    with engine.begin() as conn:
        job = queue.enqueue(conn, tenant="t", args=TrainArgs.model_validate({"recipe": recipe}))
        queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_c", source="s"))
    suffix = job.partition("_")[2]
    keys = [publish(f"models/model_{suffix}/1", "model"), publish(f"checkpoints/{job}/7-1", "checkpoint")]
    publish("datasets/ds_c/1", "dataset")
    assert sweep(engine, store, older_than_s=-1) == []
    with engine.begin() as conn:
        queue.cancel(conn, "t", job)
    assert sorted(sweep(engine, store, older_than_s=-1)) == sorted(keys)


def test_a_report_stays_with_its_job(engine: sa.Engine, store: Store, publish: Any) -> None:
    _add(engine, dataset, id="ds_d", name="n", source="s", state="ready", artifact="datasets/ds_d/1", digest="d")
    _add(engine, model, id="model_d", artifact="models/model_d/1", digest="d", info={})
    info = WorkerInfo("w", ["bulk"], list(KINDS), "h", "b", 1, None, "cpu", "0")
    leases.register(engine, info)
    with engine.begin() as conn:
        job = queue.enqueue(conn, tenant="t", args=EvaluateArgs(model="model_d", datasets=["ds_d"]))
    (claim,) = leases.claim(engine, worker_id="w", lane="bulk", kinds=KINDS, ttl_s=20)
    key = publish(f"reports/{job}/{claim.epoch}", "report")
    outcomes.finish(engine, claim, "w", EvaluateResult(artifact=key, summary={}))
    assert sweep(engine, store, older_than_s=-1) == []
    queue.prune(engine, older_than_s=-1)
    assert sweep(engine, store, older_than_s=-1) == [key]


def test_the_matches_of_a_compose_job_stay_with_it_though_its_sets_are_gone(
    engine: sa.Engine, store: Store, publish: Any
) -> None:
    _add(engine, model, id="model_g", artifact="models/model_g/1", digest="d", info={})
    sets = [publish(f"embeddings/emb_{name}/1", "embeddings") for name in ("g", "h")]
    for key in sets:
        _add(engine, embedding_set, id=key.split("/")[1], artifact=key, info={"digest": "d"}, job_id="job_g")
    leases.register(engine, WorkerInfo("w", ["bulk"], list(KINDS), "h", "b", 1, None, "cpu", "0"))
    asked = {"source": {"embeddings": "emb_g"}, "target": {"embeddings": "emb_h"}}
    legs = [{"model": "model_g", "from": "a", "to": "b"}]
    with engine.begin() as conn:
        job = queue.enqueue(conn, tenant="t", args=ComposeArgs.model_validate(asked | {"legs": legs}))
    (claim,) = leases.claim(engine, worker_id="w", lane="bulk", kinds=KINDS, ttl_s=20)
    key = publish(f"reports/{job}/{claim.epoch}", "report")
    result = ComposeResult(artifact=key, num_sources=1, num_targets=1, top_k=1, summary={}, warnings=[], num_bytes=1)
    assert outcomes.finish(engine, claim, "w", result)
    for name in ("emb_g", "emb_h"):
        _drop(engine, embedding_set, name)
    assert sorted(sweep(engine, store, older_than_s=-1)) == sorted(sets)
    assert store.exists(key)


def test_bytes_survive_a_sweep_of_others(engine: sa.Engine, store: Store, publish: Any) -> None:
    key = publish("models/model_e/1", "model")
    _add(engine, model, id="model_e", artifact=key, digest="d", info={})
    publish("models/model_f/1", "model")
    sweep(engine, store, older_than_s=-1)
    store.verify(key)
    assert store.read(key, "file") == key.encode()


@pytest.mark.parametrize(("days", "num_left"), [(30.0, 1), (0.0, 2)])
def test_finished_jobs_go_after_their_time_unless_kept_for_ever(
    days: float, num_left: int, engine: sa.Engine, tmp_path: Path
) -> None:
    with engine.begin() as conn:
        old, new = (
            queue.enqueue(conn, tenant="t", args=IngestArgs(dataset="ds_a", source="s"), name=name)
            for name in ("old", "new")
        )
        for name in (old, new):
            queue.cancel(conn, "t", name)
        long_ago = after(sa.literal(-31 * 86_400.0))
        conn.execute(sa.update(job).where(job.c.public_id == old).values(finished_at=long_ago))
    sweeper = Sweeper(engine, str(tmp_path / "store"), job_retention_days=days)
    sweeper.start()
    sweeper.join()
    with engine.connect() as conn:
        left = conn.execute(sa.select(job.c.name).order_by(job.c.name)).scalars().all()
    assert left == ["new", "old"][:num_left]
