from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worker.theory import composing, gaussian


def test_recall_counts_whole_groups_and_ties_are_chance() -> None:
    right = torch.eye(100)
    assert composing.recall(lambda group: right[group, group], 100) == 1.0
    assert composing.recall(lambda group: torch.zeros(32, 32), 70) == pytest.approx(composing.CHANCE)
    half = torch.eye(64)
    half[:32] = 0
    assert composing.recall(lambda group: half[group, group], 64) == pytest.approx((1 + composing.CHANCE) / 2)


def test_sums_do_without_the_offsets_of_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offset for each target spoils the plain ranking, and not the one without; large bridges are summed alike."""
    law = gaussian.views(0, (6, 2, 6), noise=0.3)
    rng = np.random.default_rng(0)
    triples, bridge = law.draw(64, rng), law.draw(2000, rng).b
    legs = composing.exact(law.first_leg, law.second_leg, triples, bridge)
    offset = torch.from_numpy(rng.normal(size=64)) * 20

    def spoiled(group: slice) -> tuple[torch.Tensor, torch.Tensor]:
        f_source, f_target = legs(group)
        return f_source, f_target + offset[group]

    plain, without = composing.summed_recall(legs, 64, 2000, lambda: None)
    worse, same = composing.summed_recall(spoiled, 64, 2000, lambda: None)
    assert same == pytest.approx(without, abs=1e-9)
    assert worse < plain / 2
    assert plain == pytest.approx(composing.ratio_recall(law.whole, triples), abs=0.1)
    monkeypatch.setattr(composing, "DETAILED", 100)
    assert composing.summed_recall(legs, 64, 2000, lambda: None) == pytest.approx((plain, without), abs=1e-9)


def test_a_sum_is_over_the_first_items_of_the_bridge() -> None:
    f = torch.zeros(32, 10), torch.zeros(10, 32)
    f[1][7] = torch.eye(32)[0] * math.inf  # would be seen
    assert composing.summed_recall(lambda group: f, 32, 7, lambda: None)[0] == pytest.approx(composing.CHANCE)
