from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from service.contract import outcomes, references
from service.contract.errors import NotFound
from service.contract.jobs import TrainArgs
from service.contract.recipe import Recipe
from service.contract.tables import checkpoint, job_input, model


def train(dataset: str, **starts: str) -> TrainArgs:
    """Return a job whose towers `image` and `text` start from models."""
    towers: dict[str, Any] = {
        "image": {"tokens": {"kind": "image"}, "preset": "tiny"},
        "text": {"tokens": {"kind": "text"}, "preset": "tiny"},
    }
    for name, ref in starts.items():
        towers[name]["init_from"] = {"model": ref}
    pairs = [{"dataset": dataset, "modalities": ["image", "text"]}]
    return TrainArgs(recipe=Recipe.model_validate({"towers": towers, "pairs": pairs}))


def resolve(world: Any, args: TrainArgs, **options: Any) -> dict[str, Any]:
    with world.engine.begin() as conn:
        return references.resolve(conn, "t", args, **options)


def needs(world: Any, row_id: str) -> bool:
    with world.engine.connect() as conn:
        return references.is_needed(conn, "t", row_id)


def test_what_towers_start_from_is_an_input_and_needed_until_the_job_ends(world: Any) -> None:
    world.worker()
    data, first, second = world.dataset(), world.model(alias="best"), world.model()
    world.add(train(data, image="best", text=second))
    assert {row.ref for row in world.rows(job_input)} == {data, first, second}
    assert needs(world, first)
    assert needs(world, second)
    claim = world.take(lane="train")
    assert claim.inputs.keys() == {"best", second, data}
    assert claim.inputs["best"] == {
        "artifact": f"models/{first}/1",
        "digest": "e" * 64,
        "id": first,
        "kind": "model",
    }
    assert needs(world, first)
    outcomes.fail(world.engine, claim, "w1", {"type": "Permanent", "message": "no"}, retry=False, delay_s=0)
    assert not needs(world, first)


@pytest.mark.parametrize("whose", ["nobody", "another tenant"])
def test_a_model_that_is_not_the_callers_is_not_found_and_named_by_its_place(world: Any, whose: str) -> None:
    ref = world.model(tenant="other", alias="best") if whose == "another tenant" else "model_none"
    for name in {ref, "best"}:
        with pytest.raises(NotFound) as refusal:
            resolve(world, train(world.dataset(), text=name))
        assert refusal.value.param == "recipe.towers.text.init_from.model"
        assert refusal.value.code == "model_not_found"


def test_a_checkpoint_is_a_model_to_start_from(world: Any) -> None:
    world.worker()
    data = world.dataset()
    first = world.add(train(data))
    claim = world.take(lane="train")
    saved = [outcomes.Saved(step, f"checkpoints/{first}/{step}-1", f"{step}", {}) for step in (5, 10)]
    outcomes.record(world.engine, claim, "w1", outcomes.Batch(checkpoints=saved))
    found = resolve(world, train(data, text=f"{first}@latest", image=f"{first}@5"))
    assert found[f"{first}@latest"]["id"] == f"{first}@10"
    assert found[f"{first}@5"]["artifact"] == f"checkpoints/{first}/5-1"


def test_a_run_that_has_a_checkpoint_does_not_need_what_it_started_from(world: Any) -> None:
    data, gone = world.dataset(), world.model()
    args = train(data, text=gone)
    world.execute(sa.update(model).values(deleted_at=datetime.now(UTC)))
    with pytest.raises(NotFound):
        resolve(world, args)
    assert resolve(world, args, resumes=True).keys() == {data}


def test_a_claim_knows_whether_a_run_resumes(world: Any) -> None:
    """A checkpoint that a run started from is pruned by its own run, whoever else began with it."""
    world.worker()
    data = world.dataset()
    teacher = world.add(train(data))
    teaching = world.take(lane="train")
    saved = [outcomes.Saved(5, f"checkpoints/{teacher}/5-1", "5", {})]
    outcomes.record(world.engine, teaching, "w1", outcomes.Batch(checkpoints=saved))
    pupil = world.add(train(data, text=f"{teacher}@5"))
    learning = world.take(lane="train")
    assert learning.public_id == pupil
    mine = [outcomes.Saved(1, f"checkpoints/{pupil}/1-1", "1", {})]
    outcomes.record(world.engine, learning, "w1", outcomes.Batch(checkpoints=mine))
    world.execute(sa.delete(checkpoint).where(checkpoint.c.step == 5))
    outcomes.fail(world.engine, learning, "w1", {"type": "Transient", "message": "again"}, retry=True, delay_s=0)
    world.make_due()
    again = world.take(lane="train")
    assert again.resume == [f"checkpoints/{pupil}/1-1"]
    assert again.inputs.keys() == {data}
