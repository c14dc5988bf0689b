from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worker.evaluation import calibration


def calibrated(num: int, num_labels: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from their softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(num, num_labels, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def test_a_calibrated_classifier_has_no_error_and_needs_no_temperature() -> None:
    logits, truth = calibrated(20_000, 5)
    found = calibration.measure(logits, truth, 15, seed=0)
    assert found.expected_calibration_error.value < 0.015
    assert found.temperature == pytest.approx(1, abs=0.03)
    assert not found.temperature_at_limit
    for each in found.reliability:
        if each.num_samples > 200:
            assert each.accuracy is not None
            assert each.confidence is not None
            assert each.accuracy.standard_error is not None
            assert abs(each.accuracy.value - each.confidence) < 4 * each.accuracy.standard_error
    assert sum(each.num_samples for each in found.reliability) == 20_000


@pytest.mark.parametrize("distortion", [0.25, 4.0])
def test_a_known_distortion_is_found_and_taken_back(distortion: float) -> None:
    logits, truth = calibrated(20_000, 5)
    found = calibration.measure(logits * distortion, truth, 15, seed=0)
    assert found.temperature == pytest.approx(distortion, rel=0.03)
    assert found.expected_calibration_error.value > 0.1
    assert found.expected_calibration_error_after.value < 0.02
    assert found.cross_entropy_after.value < found.cross_entropy_before.value
    assert found.num_fitted + found.num_measured == found.num_samples
    interval = found.expected_calibration_error.interval
    assert interval is not None
    assert interval[0] < found.expected_calibration_error.value < interval[1]


def test_the_error_of_two_bins_is_what_one_counts_by_hand() -> None:
    confidence = torch.tensor([0.5, 0.5, 0.9, 0.7], dtype=torch.float64)  # 0.5 is in the lower bin
    hit = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    found = calibration.expected_calibration_error(confidence, hit, 2)
    assert found == pytest.approx(2 / 4 * 0 + 2 / 4 * abs(0.5 - 0.8))


def test_without_a_mistake_the_temperature_is_at_its_limit() -> None:
    truth = torch.arange(40) % 2
    logits = torch.nn.functional.one_hot(truth).double()
    found = calibration.measure(logits, truth, 15, seed=0)
    assert (found.temperature, found.temperature_at_limit) == (1e-3, True)
    assert found.cross_entropy_after.value == pytest.approx(0)


def test_logits_that_know_nothing_are_cooled_for_ever() -> None:
    truth = torch.arange(40) % 2
    logits = torch.nn.functional.one_hot(1 - truth).double()
    found = calibration.measure(logits, truth, 15, seed=0)
    assert (found.temperature, found.temperature_at_limit) == (1e3, True)


def test_equal_logits_are_right_as_often_as_they_say() -> None:
    found = calibration.measure(torch.zeros(30, 3).double(), torch.zeros(30, dtype=torch.int64), 15, seed=0)
    assert found.expected_calibration_error.value == pytest.approx(0)
    assert found.cross_entropy.value == pytest.approx(math.log(3))
