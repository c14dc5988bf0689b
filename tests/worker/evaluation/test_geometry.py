from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.evaluation import geometry


def sphere(num: int, dim: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_partners_in_one_place_are_aligned_and_unrelated_ones_at_two() -> None:
    z = sphere(4000, 64, 0)
    assert geometry.alignment(z, z).value == 0
    found = geometry.alignment(z, sphere(4000, 64, 1))
    assert found.standard_error is not None
    assert abs(found.value - 2) < 4 * found.standard_error
    assert geometry.alignment(z, -z).value == pytest.approx(4, abs=1e-5)


def test_uniformity_of_points_one_knows() -> None:
    """One point: 0. Two opposite ones, half each: every item meets (n / 2 - 1) copies and n / 2 opposites at 4."""
    z = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    assert geometry.uniformity(z).value == pytest.approx(0)
    z[5:] *= -1
    found = geometry.uniformity(z)
    assert found.value == pytest.approx(math.log((4 + 5 * math.exp(-8)) / 9))
    assert found.standard_error == pytest.approx(0)


def test_uniformity_on_a_circle_is_a_bessel_function_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """E exp(-2 (2 - 2 cos)) = exp(-4) I_0(4) on the circle."""
    angles = 2 * math.pi * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    z = torch.stack([angles.cos(), angles.sin()], 1)
    found = geometry.uniformity(z)
    expected = -4 + math.log(float(torch.special.i0(torch.tensor(4.0, dtype=torch.float64))))
    assert found.standard_error is not None
    assert abs(found.value - expected) < max(4 * found.standard_error, 0.002)
    monkeypatch.setattr(geometry, "ROWS_AT_ONCE", 77)
    assert geometry.uniformity(z).value == pytest.approx(found.value)


def test_the_error_of_uniformity_is_its_spread() -> None:
    found = [geometry.uniformity(functional.normalize(sphere(200, 3, seed) + 0.5, dim=1)) for seed in range(100)]
    spread = float(torch.tensor([each.value for each in found]).std())
    errors = [each.standard_error or 0.0 for each in found]
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.25)


def test_a_gap_is_the_distance_of_the_means_and_chance_has_a_size() -> None:
    z = sphere(4000, 16, 0)
    shift = torch.zeros(16)
    shift[0] = 0.3
    found, _ = geometry.gap(z, z + shift)
    assert found.value == pytest.approx(0.3, abs=1e-5)
    none, by_chance = geometry.gap(z, sphere(4000, 16, 1))
    assert none.value == pytest.approx(by_chance, rel=0.6)
    same, _ = geometry.gap(z, z)
    assert (same.value, same.standard_error) == (0, 0)


def test_modalities_are_told_apart_if_they_lie_apart() -> None:
    a, b = sphere(400, 8, 0), sphere(400, 8, 1)
    mixed = geometry.separable(a, b)
    assert mixed is not None
    assert mixed.standard_error is not None
    assert abs(mixed.value - 0.5) < 4 * mixed.standard_error
    shift = torch.zeros(8)
    shift[0] = 2
    apart = geometry.separable(functional.normalize(a + shift, dim=1), functional.normalize(b - shift, dim=1))
    assert apart is not None
    assert apart.value == 1
    assert geometry.separable(a[:19], b[:19]) is None
