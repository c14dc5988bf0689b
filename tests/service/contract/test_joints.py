from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.errors import Invalid
from service.contract.jobs import ComposeArgs
from service.contract.joints import Asked, check_weights, joints_of
from service.contract.operations import ComposeRequest, EmbeddingSetRef, Joint, SetJoint

SET = EmbeddingSetRef(embeddings="emb_a")


@pytest.mark.parametrize("through", [None, "text", SET, [SET, SET], ["a caption", "another"]])
def test_two_legs_have_one_joint_whichever_way_it_is_said(through: Any) -> None:
    plain = joints_of(through, [1.0], 1)
    assert plain == [Asked(through, [1.0], "through", "bridge_weights")]
    for joint in (Joint, SetJoint):
        if joint is SetJoint and isinstance(through, list) and through != [SET, SET]:
            continue
        (found,) = joints_of([joint(through=through, weights=[1.0])], None, 1)
        assert (found.through, found.weights) == (through, [1.0])
        assert (found.param, found.weights_param) == ("through[0].through", "through[0].weights")


@pytest.mark.parametrize(
    ("through", "is_bank", "sets"),
    [
        (None, True, []),
        ("text", True, []),
        (SET, False, [SET]),
        ([SET, SET], False, [SET, SET]),
        (["a caption"], False, []),
    ],
)
def test_a_bridge_is_of_banks_or_of_sets_or_of_items(through: Any, is_bank: bool, sets: list[EmbeddingSetRef]) -> None:
    (asked,) = joints_of(through, None, 1)
    assert (asked.is_bank, asked.sets) == (is_bank, sets)


def test_more_legs_have_banks_or_as_many_joints() -> None:
    assert [asked.is_bank for asked in joints_of(None, None, 3)] == [True] * 3
    joints = [Joint(through="text"), Joint(through=["a"])]
    assert [asked.through for asked in joints_of(joints, None, 2)] == ["text", ["a"]]
    assert joints_of(None, None, 0) == joints_of("text", None, 0) == []
    wrong: list[tuple[Any, list[float] | None, int, str]] = [
        (joints, None, 3, "through"),
        ("text", None, 2, "through"),
        (None, [1.0], 2, "bridge_weights"),
        (joints, [1.0], 2, "bridge_weights"),
    ]
    for through, weights, num, param in wrong:
        with pytest.raises(Invalid) as refused:
            joints_of(through, weights, num)
        assert refused.value.param == param


@pytest.mark.parametrize(("weights", "num"), [([1.0], 2), ([0.0, 0.0], 2)])
def test_weights_are_those_of_the_items(weights: list[float], num: int) -> None:
    check_weights(Asked(SET, [1.0, 0.0], "through", "w"), 2)
    check_weights(Asked(None, None, "through", "w"), 0)
    with pytest.raises(Invalid):
        check_weights(Asked(SET, weights, "through", "w"), num)
    with pytest.raises(Invalid, match="drawn from p"):
        check_weights(Asked("text", [1.0], "through", "w"), 1)


ENDS: dict[str, Any] = {"source": {"embeddings": "emb_a"}, "target": {"embeddings": "emb_b"}, "model": "m"}


@pytest.mark.parametrize(
    ("through", "at"),
    [
        ([], ("through", "items")),
        (7, ("through",)),
        ({"text": "a caption"}, ("through",)),
        ({"embeddings": 7}, ("through", "set", "embeddings")),
        ([{"embeddings": "emb_a"}, {"text": "a caption"}], ("through", "sets", 1)),
        ([{"text": "a caption"}, {"embeddings": "emb_a"}], ("through", "items", 1)),
        ([{"through": 7}], ("through", "joints", 0, "through")),
    ],
)  # fmt: skip
def test_a_bridge_that_is_none_gives_one_kind_of_error_at_its_own_place(through: Any, at: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        ComposeRequest.model_validate(ENDS | {"through": through})
    assert {each["loc"][: len(at)] for each in refused.value.errors()} == {at}


def test_the_bridge_of_a_job_has_no_items() -> None:
    for given in ("text", {"embeddings": "emb_a"}, [{"embeddings": "emb_a"}] * 2, [{"through": None}], None):
        args = ComposeArgs.model_validate(ENDS | {"through": given})
        again = ComposeArgs.model_validate_json(args.model_dump_json())
        assert again == args
    for given in (["a caption"], [{"text": "a caption"}], [{"through": ["a caption"]}]):
        with pytest.raises(ValidationError, match="a bridge is"):
            ComposeArgs.model_validate(ENDS | {"through": given})
