from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.contract.errors import Invalid
from service.contract.towers import PretrainedTower, Tower, check_start


def tower(**fields: Any) -> Tower:
    return Tower.model_validate({"tokens": {"kind": "text", "max_length": 16}, "preset": "tiny"} | fields)


def test_a_tower_starts_from_its_like_whatever_it_is_called_and_however_it_learns() -> None:
    start = {"init_from": {"model": "m"}}
    spelt_out = {"preset": None, "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 4.0}
    for fields in ({}, spelt_out, start | {"lora": {}}, start | {"frozen_blocks": 1}, {"dropout": 0.5}):
        check_start(tower(**fields), 32, tower(), 64)
    check_start(tower(**start, locked=True), 64, tower(), 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 128}, "width is 128 here and 64 in"),
        ({"depth": 3}, "depth is 3 here and 2 in"),
        ({"heads": 8}, "heads is 8 here and 4 in"),
        ({"mlp_ratio": 2}, "mlp_ratio is 2.0 here and 4.0 in"),
        ({"positions": "rotary"}, "positions is rotary here and learned in"),
        ({"pooling": "cls"}, "pooling is cls here and mean in"),
        ({"tokens": {"kind": "text", "max_length": 32}}, "tokens.max_length is 32 here and 16 in"),
        ({"tokens": {"kind": "image"}}, "tokens.kind is image here and text in"),
        ({"locked": True, "init_from": {"model": "m"}}, "dimensions is 32 here and 64 in"),
    ],
)
def test_what_differs_is_named_with_both_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid, match=message) as refusal:
        check_start(tower(**fields), 32, tower(), 64)
    assert refusal.value.code == "start_differs"


@pytest.mark.parametrize(
    ("family", "tokens", "reads"),
    [
        ("clip", {"kind": "discrete", "vocab": 9, "max_length": 4}, "image and text"),
        ("clip", {"kind": "audio"}, "image and text"),
        ("siglip", {"kind": "continuous", "dim": 3, "max_length": 4}, "image and text"),
        ("clap", {"kind": "image", "size": 8, "patch": 4}, "audio and text"),
        ("bert", {"kind": "image", "size": 8, "patch": 4}, "text"),
    ],
)
def test_a_family_is_refused_tokens_that_it_cannot_read(family: str, tokens: dict[str, Any], reads: str) -> None:
    fields = {"family": family, "config": {}, "size": 8, "depth": 1}
    with pytest.raises(ValidationError, match=f"{family} reads {reads} "):
        PretrainedTower.model_validate(fields | {"tokens": tokens})
    PretrainedTower.model_validate(fields | {"tokens": {"kind": "text"}})
