from __future__ import annotations

import math

import pytest
import torch

from worker.composition import normal


def drawn(num: int, dim: int) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_round_normal_cloud_passes() -> None:
    found = normal.measure(3 * drawn(4000, 8))
    assert found.axis_mean < 0.06
    assert found.axis_variance == pytest.approx((9, 9), rel=0.1)
    assert max(map(abs, found.axis_kurtosis)) < 0.3
    assert 1 <= found.elongation < 1.15
    assert found.verdict == "passes"


def test_known_figures() -> None:
    corners = torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]]) + torch.tensor([0.0, 5.0])
    found = normal.measure(corners)
    assert found.axis_variance == pytest.approx((1, 4))
    assert found.axis_kurtosis == pytest.approx((-2, -2))  # a coin's
    assert found.elongation == pytest.approx(4 / 2.5)
    assert found.axis_mean == pytest.approx(5 / math.sqrt(2.5))


def test_a_long_cloud_and_heavy_tails_do_not_pass() -> None:
    z = drawn(4000, 8)
    assert normal.measure(z * torch.tensor([3.0] + [1.0] * 7)).verdict == "doubtful"
    assert normal.measure(z * torch.tensor([50.0] + [0.1] * 7)).verdict == "doubtful"  # at most d
    assert normal.measure(z.sign() * z.abs() ** 3).verdict == "fails"


def test_more_dimensions_than_items_are_no_evidence_of_length() -> None:
    assert normal.measure(drawn(50, 200)).verdict == "passes"


def test_vectors_that_do_not_differ_have_no_shape() -> None:
    with pytest.raises(ValueError, match="have no shape"):
        normal.measure(torch.ones(5, 3))
