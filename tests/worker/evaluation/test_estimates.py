from __future__ import annotations

import numpy as np
import pytest
import torch

from worker.evaluation import estimates


def test_the_error_of_a_mean_is_that_of_many_means() -> None:
    draws = torch.randn(400, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [estimates.mean(draw) for draw in draws]
    spread = float(torch.tensor([each.value for each in found]).std())
    errors = [each.standard_error for each in found if each.standard_error is not None]
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)


def test_one_sample_has_no_error() -> None:
    found = estimates.mean(torch.tensor([2.0]))
    assert (found.value, found.standard_error) == (2.0, None)


def test_a_bootstrap_interval_of_a_mean_is_two_standard_errors_wide_on_each_side() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = estimates.bootstrap(400, lambda at: float(values[at].mean()), seed=1, num_resamples=1000)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)
