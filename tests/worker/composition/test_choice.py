from __future__ import annotations

from typing import Any

import pytest

from worker.composition.choice import choose

EVEN: dict[str, Any] = {"comparable": True, "resultant": 0.1, "sample_size": 3.0, "rank_agreement": 0.5}


@pytest.mark.parametrize(
    ("critic", "seen", "method", "words"),
    [
        ("cosine", {}, "direct", "lies evenly"),
        ("cosine", {"sample_size": 30.0}, "marginal", "carries the sum"),
        ("cosine", {"sample_size": 30.0, "rank_agreement": 0.97}, "marginal", "same order"),
        ("cosine", {"resultant": 0.31}, "marginal", "concentrated"),
        ("cosine", {"resultant": 0.27}, "marginal", "nothing says"),
        ("cosine", {"resultant": 0.27, "rank_agreement": 0.96}, "direct", "agrees"),
        ("cosine", {"resultant": None, "rank_agreement": None}, "marginal", "nothing says"),
        ("cosine", {"comparable": False}, "marginal", "differently"),
        ("dot", {}, "marginal", "inner products"),
        ("dot", {"rank_agreement": 1.0}, "marginal", "inner products"),
        ("squared_distance", {}, "marginal", "ranks differently"),
        ("squared_distance", {"rank_agreement": 0.96}, "direct", "agrees"),
    ],
)
def test_the_method_follows_from_what_was_seen_and_the_reason_says_it(
    critic: Any, seen: dict[str, Any], method: str, words: str
) -> None:
    found, reason = choose(critic, **EVEN | seen)
    assert found == method
    assert words in reason
