from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from service.contract.losses import InfoNCE
from worker.learning import losses
from worker.theory import encoders, generators, measures


@dataclass(frozen=True)
class Case:
    generator: generators.Generator
    oracle: encoders.Encoders
    ignorant: encoders.Encoders


@pytest.fixture
def case() -> Case:
    """A case study with encoders that see the codes alone, and ones that see nothing."""
    generator = generators.case_study(0, own_norm=4.0, num_classes=8)

    def linear(weight: np.ndarray) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(torch.from_numpy(weight).float(), requires_grad=False)
        return layer

    g, h = (np.linalg.pinv(mixing)[:32] for mixing in (generator.mixing_x, generator.mixing_y))
    return Case(
        generator,
        encoders.Encoders(linear(g), linear(h), "dot", 20.0),
        encoders.Encoders(linear(0 * g), linear(0 * h), "dot", 1.0),
    )


def test_the_oracle_makes_no_mistake_and_ignorance_is_chance(case: Case) -> None:
    knowing = measures.zero_shot(case.generator, case.oracle, 0)
    assert knowing.error == {1: 0.0, 3: 0.0}
    assert knowing.log_sum_exp < 1e-3
    nothing = measures.zero_shot(case.generator, case.ignorant, 0)
    assert nothing.error[1] == pytest.approx(7 / 8)  # all scores are equal: random order, not a lucky one
    assert nothing.error[3] == pytest.approx(5 / 8)
    assert nothing.log_sum_exp == pytest.approx(np.log(8))
    for found in (knowing, nothing):
        assert all(found.bound[r] >= found.error[r] for r in measures.TOP)


def test_the_oracles_margin_is_the_codes(case: Case) -> None:
    found = measures.margin(case.generator, case.oracle, 0)
    assert found.positive == pytest.approx(1, abs=1e-5)
    assert case.generator.margin - 1e-5 <= found.hardest <= found.mean_negative
    assert measures.margin(case.generator, case.ignorant, 0).hardest == 0


def test_the_excess_of_a_perfect_score_is_nothing_and_that_of_none_is_the_rest_of_the_loss(case: Case) -> None:
    assert abs(measures.excess(case.generator, case.oracle, 16, 0, num_pairs=3200)) < 1e-3
    floor = 2 * (losses.floor(InfoNCE(), 16, np.ones(8, dtype=np.int64)) or 0)
    found = measures.excess(case.generator, case.ignorant, 16, 0, num_pairs=32_000)
    assert found == pytest.approx(2 * np.log(16) - floor, rel=0.02)


def test_tests_draw_other_data_than_training(case: Case) -> None:
    rng = np.random.default_rng(0)
    tested = np.random.default_rng(measures.SEED_OF_TESTS)
    assert not torch.equal(case.generator.draw(10, rng).x, case.generator.draw(10, tested).x)
