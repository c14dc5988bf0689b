from __future__ import annotations

import re
from typing import get_args

import pytest
from pydantic import ValidationError

from service.contract.jobs import (
    KINDS,
    POLICIES,
    EmbedArgs,
    EvaluateArgs,
    Holdout,
    IngestArgs,
    JobArgs,
    JobResult,
    State,
    args_adapter,
    status_of,
)

FROZEN = ("ingest", "train", "embed", "evaluate", "experiment", "import_model", "compose")
"""Append only: rows with these words are worked years from now."""


def kinds_of(union: object) -> list[str]:
    return [cls.model_fields["kind"].default for cls in get_args(get_args(union)[0])]


def test_kinds_are_for_ever() -> None:
    assert KINDS[: len(FROZEN)] == FROZEN
    assert set(KINDS) == set(FROZEN), "a new kind is added to the end of FROZEN in the same change"
    assert all(re.match(r"^[a-z_]{1,32}$", kind) for kind in KINDS)


def test_every_kind_has_arguments_a_result_and_a_policy() -> None:
    assert kinds_of(JobArgs) == kinds_of(JobResult) == list(POLICIES) == list(KINDS)


def test_every_state_has_a_status_and_a_cancelled_run_is_cancelling() -> None:
    shown = {state: status_of(state, cancel_requested=False) for state in get_args(State)}  # pyright: ignore[reportArgumentType]
    assert shown == {state: state for state in get_args(State)} | {"scheduled": "queued"}
    assert status_of("running", cancel_requested=True) == "cancelling"
    assert status_of("cancelled", cancel_requested=True) == "cancelled"


def test_arguments_survive_their_json() -> None:
    args = EmbedArgs(model="job_x@latest", dataset="ds_a", modality="image", split="holdout")
    assert args_adapter.validate_python(args.model_dump(mode="json")) == args


@pytest.mark.parametrize("number", ["1e-3", True, "nan"])
def test_a_number_is_never_a_string_or_a_truth(number: object) -> None:
    with pytest.raises(ValidationError):
        IngestArgs.model_validate({"dataset": "ds_a", "source": "s", "max_bad_fraction": number})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"groups": ["ann"]}, "name it in group_by"),
        ({"groups": ["ann"], "group_by": "speaker", "fraction": 0.1}, "give one of the two"),
        ({"groups": [], "group_by": "speaker"}, "groups"),
        ({"groups": "ann", "group_by": "speaker"}, "groups"),
        ({"groups": [7], "group_by": "speaker"}, "groups"),
    ],
)
def test_groups_are_held_out_by_name_or_by_a_fraction(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Holdout.model_validate(fields)


@pytest.mark.parametrize("prompts", [{}, {"a": ["one"]}, {"a": ["one"], "b": []}])
def test_prompts_that_tell_nothing_apart_are_refused(prompts: dict[str, list[str]]) -> None:
    with pytest.raises(ValidationError, match=r"prompt|labels"):
        EvaluateArgs(model="m", datasets=["ds_a"], prompts=prompts)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parts": []}, "parts"),
        ({"parts": ["accuracy"]}, "parts"),
        ({"parts": ["margins", "margins"]}, "margins is named twice"),
        ({"parts": ["linear_probe"], "split": "all"}, "parts: linear_probe .* holdout, not on all"),
        ({"prompts": {"a": ["x"], "b": ["y"]}, "max_prompts": 3}, "max_prompts"),
        ({"parts": ["margins"], "ks": [1]}, "ks: none of the parts reads it; retrieval, zero_shot, certificate would"),
        ({"parts": ["retrieval"], "prompts": {"a": ["x"], "b": ["y"]}}, "prompts: none of the parts"),
        ({"parts": ["geometry"], "max_prompts": 3}, "max_prompts: none of the parts"),
        ({"parts": ["zero_shot"], "bins": 3}, "bins: none of the parts"),
        ({"bins": 1}, "bins"),
        ({"max_prompts": 0}, "max_prompts"),
    ],
)
def test_what_an_evaluation_would_not_read_is_refused_by_name(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EvaluateArgs.model_validate({"model": "m", "datasets": ["ds_a"]} | fields)


def test_an_evaluation_of_yesterday_is_one_of_today() -> None:
    args = EvaluateArgs.model_validate({"kind": "evaluate", "model": "m", "datasets": ["ds_a"], "ks": [1, 3]})
    assert (args.parts, args.max_prompts, args.bins) == (None, None, None)
