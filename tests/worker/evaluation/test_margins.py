from __future__ import annotations

import math

import pytest
import torch

from worker.evaluation import margins


def test_margins_of_a_batch_that_one_can_check_by_eye() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.8, 0.7], [0.3, 0.95, 0.6]])
    different = ~torch.eye(3, dtype=torch.bool)
    found = margins.measure([(scores, different)], ("a", "b"), "label", scale=2.0, num_bins=4)
    assert not isinstance(found, str)
    forth, back = found.directions
    assert (forth.source, forth.target, back.source, back.target) == ("a", "b", "b", "a")
    assert forth.hardest.value == pytest.approx((0.4 + 0.1 - 0.35) / 3, abs=1e-6)
    assert back.hardest.value == pytest.approx((0.6 - 0.15 - 0.1) / 3, abs=1e-6)
    assert forth.mean_negative.value == pytest.approx((0.6 + 0.35 - 0.025) / 3, abs=1e-6)
    assert forth.positive_share.value == pytest.approx(2 / 3)
    assert found.positive_score.value == pytest.approx(2.3 / 3)
    assert sum(forth.histogram.counts) == 3
    assert len(forth.histogram.edges) == 5
    assert (found.num_batches, found.batch_size, found.num_queries) == (1, 3, 3)
    assert forth.hardest.standard_error is None, "one batch says nothing of the spread of batches"
    (at_trained,) = [each for each in found.by_temperature if each.temperature == 0.5]
    both = torch.nn.functional.cross_entropy(2 * scores, torch.arange(3)) + torch.nn.functional.cross_entropy(
        2 * scores.T, torch.arange(3)
    )
    assert at_trained.cross_entropy.value == pytest.approx(float(both) / 2, abs=1e-6)


def test_samples_of_one_class_are_no_negatives() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 0.5]])
    negatives = torch.tensor([[False, False, True], [False, False, True], [True, True, False]])
    found = margins.measure([(scores, negatives)], ("a", "b"), "payload", scale=None, num_bins=2)
    assert not isinstance(found, str)
    assert found.directions[0].hardest.value == pytest.approx((0.1 + 0.1 + 0.5) / 3)
    assert (found.scale, found.temperature, found.by_temperature) == (None, None, [])
    alone = margins.measure([(scores, torch.zeros(3, 3, dtype=torch.bool))], ("a", "b"), "label", 1.0, 2)
    assert isinstance(alone, str)


def test_errors_are_those_of_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(8, 8, generator=generator) + torch.randn(1, generator=generator) * torch.eye(8), different)
        for different in [~torch.eye(8, dtype=torch.bool)] * 50
    ]
    found = margins.measure(batches, ("a", "b"), "label", scale=None, num_bins=10)
    assert not isinstance(found, str)
    own = torch.tensor(
        [float((scores.diagonal() - (scores - 99 * torch.eye(8)).amax(1)).mean()) for scores, _ in batches]
    )
    assert found.directions[0].hardest.value == pytest.approx(float(own.mean()), abs=1e-5)
    assert found.directions[0].hardest.standard_error == pytest.approx(float(own.std()) / math.sqrt(50), rel=1e-4)


def test_a_lower_temperature_sharpens_what_is_right_and_what_is_wrong() -> None:
    scores = torch.full((4, 4), 0.2) + 0.6 * torch.eye(4)
    different = ~torch.eye(4, dtype=torch.bool)
    right = margins.measure([(scores, different)], ("a", "b"), "label", 1.0, 4)
    wrong = margins.measure([(-scores, different)], ("a", "b"), "label", 1.0, 4)
    assert not isinstance(right, str)
    assert not isinstance(wrong, str)
    rising = [each.cross_entropy.value for each in right.by_temperature]
    assert len(rising) == 9
    assert rising == sorted(rising)
    assert right.by_temperature[0].temperature == 1 / 16
    assert right.by_temperature[0].partner_probability.value == pytest.approx(1, abs=1e-3)
    assert wrong.by_temperature[0].partner_probability.value == pytest.approx(0, abs=1e-3)
