from __future__ import annotations

from typing import Any

import pytest

from service.demo.figures import accuracy, chance, figures, precision


def answer(*indices: int) -> dict[str, Any]:
    return {"matches": [{"index": index} for index in indices]}


def test_precision_counts_right_labels_among_the_first_matches() -> None:
    targets = ["one", "one", "two", "two"]
    answers = [answer(0, 1, 2, 3), answer(0, 2, 3, 1)]
    assert precision(answers, ["one", "two"], targets, 2) == pytest.approx((1.0 + 0.5) / 2)
    assert precision(answers, ["one", "two"], targets, 1) == pytest.approx(0.5)
    assert precision(answers, ["one", "two"], targets, 10) == pytest.approx(0.5)


def test_chance_is_what_random_matches_reach() -> None:
    assert chance(["one", "two"], ["one", "one", "one", "two"]) == pytest.approx((0.75 + 0.25) / 2)


def test_the_four_figures_come_with_their_bars() -> None:
    found = figures(
        image_labels=["one", "two"],
        image_predictions=["one", "two"],
        audio_labels=["one", "two"],
        audio_predictions=["one", "one"],
        to_images=[answer(0, 1), answer(1, 0)],
        to_sounds=[answer(0, 1), answer(0, 1)],
    )
    assert [(each.value, each.bar, each.chance) for each in found] == [
        (1.0, 0.93, 0.5),
        (0.5, 0.90, 0.5),
        (0.5, 0.85, 0.5),
        (0.5, 0.90, 0.5),
    ]
    assert accuracy(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 0.75
