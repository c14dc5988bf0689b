from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.evaluation import completeness


def case_study() -> tuple[Tensor, Tensor, float]:
    """The oracle score <z, z'> of Chen et al. 2024, definition 5.3: unit class vectors, gamma = 1 - largest cosine."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(300) % 20
    vectors = functional.normalize(torch.randn(20, 32, generator=generator, dtype=torch.float64), dim=1)
    inner = vectors @ vectors.T
    gamma = 1 - float((inner - 2 * torch.eye(20, dtype=torch.float64)).max())
    return inner[classes][:, classes], classes, gamma


def test_the_oracle_score_is_complete() -> None:
    scores, classes, gamma = case_study()
    found = completeness.measure(scores, classes, 1.0, seed=0)
    assert found.alpha.value == 0
    assert found.alpha.interval == (0, 0)
    assert found.beta is not None
    assert found.beta.value <= 1e-12
    assert found.gammas["0.0"].value == pytest.approx(gamma, abs=1e-9)
    assert found.gammas["0.0"].interval is None
    assert (found.num_samples, found.num_classes) == (300, 20)


def test_counts_and_variances_are_those_of_the_definition() -> None:
    """Against loops over the definition, on scores without any structure."""
    scores = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    classes = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    found = completeness.measure(scores, classes, 2.0, seed=0)
    f = scores / 2
    margins = [
        min(float(f[i, i] - f[i, j]), float(f[i, i] - f[j, i]))
        for i in range(12)
        for j in range(12)
        if classes[i] != classes[j]
    ]
    assert found.alpha.value == pytest.approx(sum(margin <= 0 for margin in margins) / len(margins))
    for alpha, gamma in found.gammas.items():
        below = sum(margin < gamma.value for margin in margins) / len(margins)
        assert below <= float(alpha)
        beyond = sum(margin < gamma.value + 1e-9 for margin in margins) / len(margins)
        assert beyond > float(alpha)
    over_x = [float(f[classes == classes[j], j].var()) for j in range(12)]
    over_y = [float(f[j, classes == classes[j]].var()) for j in range(12)]
    assert found.beta is not None
    assert found.beta.value == pytest.approx(max(sum(over_x), sum(over_y)) / 12)
    assert found.alpha_by_gamma[0][1] == 0
    assert [share for _, share in found.alpha_by_gamma] == sorted(share for _, share in found.alpha_by_gamma)


def test_intervals_hold_the_values_of_another_sample() -> None:
    """Partners score above all others of their class, which a resample must not meet more often."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(200) % 10
    z = functional.normalize(torch.randn(200, 16, generator=generator, dtype=torch.float64), dim=1)
    found = completeness.measure(z @ z.T, classes, 1.0, seed=0)
    again = functional.normalize(torch.randn(200, 16, generator=generator, dtype=torch.float64), dim=1)
    other = completeness.measure(again @ again.T, classes, 1.0, seed=0)
    assert found.beta is not None
    assert found.beta.interval is not None
    assert found.beta.interval[0] < found.beta.value < found.beta.interval[1]
    low, high = found.gammas["0.1"].interval or (0, 0)
    assert low - 0.01 < other.gammas["0.1"].value < high + 0.01


def test_classes_of_one_sample_have_no_variance() -> None:
    scores = torch.eye(4, dtype=torch.float64)
    found = completeness.measure(scores, torch.arange(4), 1.0, seed=0)
    assert found.beta is None
    assert found.gammas["0.0"].value == 1


def test_a_score_that_is_constant_keeps_no_margin() -> None:
    found = completeness.measure(torch.ones(6, 6), torch.arange(6) % 2, 1.0, seed=0)
    assert found.alpha.value == 1
    assert found.beta is not None
    assert found.beta.value == 0
