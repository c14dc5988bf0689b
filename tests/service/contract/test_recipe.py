"""What a recipe refuses, and what it fills in."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.recipe import Recipe
from service.contract.towers import Tower

CODES: dict[str, Any] = {"tokens": {"kind": "discrete", "vocab": 9, "max_length": 4}}


LOCKED: dict[str, Any] = CODES | {"init_from": {"model": "m"}, "locked": True}


def recipe(**changes: Any) -> Recipe:
    document: dict[str, Any] = {
        "towers": {"a": CODES, "b": CODES, "c": CODES},
        "pairs": [{"dataset": "ds_1", "modalities": ["a", "b"]}, {"dataset": "ds_2", "modalities": ["b", "c"]}],
    }
    return Recipe.model_validate(document | changes)


def tower(**changes: Any) -> dict[str, Any]:
    return {"a": CODES | changes, "b": CODES, "c": CODES}


def test_a_preset_fills_in_what_is_left_out() -> None:
    base = recipe(towers=tower(preset="base", depth=3)).towers["a"]
    assert isinstance(base, Tower)
    assert (base.width, base.depth, base.heads) == (768, 3, 12)
    assert (
        Recipe.model_validate_json(recipe(towers=tower(preset="base", depth=3)).model_dump_json()).towers["a"] == base
    )


def test_each_pair_may_have_a_loss_of_its_own() -> None:
    made = recipe(
        pairs=[
            {"dataset": "ds_1", "modalities": ["a", "b"], "loss": {"kind": "sigmoid"}},
            {"dataset": "ds_2", "modalities": ["b", "c"]},
        ]
    )
    assert [made.loss_of(pair).kind for pair in made.pairs] == ["sigmoid", "info_nce"]


def test_locked_towers_leave_a_scale_or_a_bias_to_learn() -> None:
    for loss in ({"kind": "info_nce"}, {"kind": "sigmoid", "learn_scale": False}):
        recipe(towers=dict.fromkeys("abc", LOCKED), loss=loss)
    recipe(towers={"a": CODES, "b": LOCKED, "c": CODES}, loss={"kind": "square"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"towers": tower(locked=True)}, "locked needs init_from"),
        ({"towers": tower(lora={})}, "lora needs init_from"),
        ({"towers": tower(frozen_blocks=1)}, "frozen_blocks needs init_from"),
        ({"towers": tower(init_from={"model": "m"}, locked=True, lora={})}, "a locked tower learns nothing"),
        ({"towers": tower(init_from={"model": "m"}, frozen_blocks=3)}, "frozen_blocks 3 is more than depth 2"),
        ({"towers": tower(augment={"kind": "image"})}, "does not fit discrete: use 'tokens'"),
        ({"towers": tower(positions="rotary", width=12)}, "width / heads is odd, 3"),
        ({"loss": {"kind": "square"}}, r"pairs\[0\]: square loss needs a locked tower"),
        (
            {"towers": dict.fromkeys("abc", LOCKED), "loss": {"kind": "info_nce", "learn_scale": False}},
            r"pairs\[0\]: both towers are locked, and no scale learns",
        ),
        ({"towers": dict.fromkeys("abc", LOCKED), "loss": {"kind": "square"}}, r"pairs\[0\]: both towers are locked"),
        ({"loss": {"kind": "k_sample", "candidates": 6}}, "batch_size 128 is not a multiple of candidates"),
        (
            {
                "pairs": [
                    {"dataset": "ds_1", "modalities": ["a", "b"], "loss": {"kind": "info_nce", "critic": "dot"}},
                    {"dataset": "ds_2", "modalities": ["b", "c"]},
                ]
            },
            r"pairs\[1\]: critic cosine beside dot",
        ),
        (
            {
                "towers": {"a": CODES, "b": CODES},
                "pairs": [
                    {"dataset": "ds_1", "modalities": ["a", "b"]},
                    {"dataset": "ds_2", "modalities": ["b", "a"], "loss": {"kind": "sigmoid"}},
                ],
            },
            r"pairs\[1\] has another loss than pairs\[0\]",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused_with_its_reason(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(**changes)
