"""Tests of even spheres, held against scipy and against spheres that are even or are not."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch.nn import functional

from worker.composition import sphere


def even(num: int, dim: int, seed: int = 0) -> torch.Tensor:
    z = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(z, dim=1)


def mixture(num: int, dim: int, concentration: float) -> torch.Tensor:
    centres = even(5, dim, seed=1) + torch.eye(dim, dtype=torch.float64)[0]
    at = torch.arange(num) % len(centres)
    return functional.normalize(concentration * functional.normalize(centres, dim=1)[at] + even(num, dim, 2), dim=1)


@pytest.mark.parametrize(("num", "dim"), [(2000, 3), (2000, 16), (400, 64), (100, 128)])
def test_an_even_sphere_passes_every_test(num: int, dim: int) -> None:
    found = sphere.measure(even(num, dim))
    assert min(found.rayleigh_p, found.bingham_p, found.projection_p) > 0.01
    assert found.resultant < 3 / math.sqrt(num)
    assert found.log_potential == pytest.approx(found.log_potential_if_even, abs=0.05)
    assert found.verdict == "passes"
    assert (found.num_items, found.dimensions) == (num, dim)


def test_p_values_of_even_spheres_are_even_themselves() -> None:
    found = [sphere.measure(even(300, 8, seed)) for seed in range(200)]
    for p in ([each.rayleigh_p for each in found], [each.bingham_p for each in found]):
        assert stats.kstest(p, "uniform").pvalue > 0.01
    assert sum(each.projection_p < 0.05 for each in found) <= 20


def test_a_concentrated_mixture_fails() -> None:
    found = sphere.measure(mixture(2000, 16, 1.5))
    assert found.resultant > 0.3
    assert max(found.rayleigh_p, found.projection_p) < 1e-6
    assert found.log_potential > found.log_potential_if_even + 0.3
    assert found.verdict == "fails"


def test_what_lies_along_an_axis_both_ways_is_seen_by_bingham_and_not_by_rayleigh() -> None:
    z = mixture(2000, 16, 1.5)
    found = sphere.measure(torch.cat([z, -z]))
    assert found.resultant == pytest.approx(0, abs=1e-12)
    assert found.rayleigh_p == pytest.approx(1)
    assert found.bingham_p < 1e-12
    assert found.largest_axis > 2.5
    assert found.verdict == "doubtful"


def test_known_statistics() -> None:
    poles = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    found = sphere.measure(poles)  # mean 0; T has one eigenvalue, 1
    assert (found.resultant, found.rayleigh, found.largest_axis) == pytest.approx((0, 0, 3))
    assert found.bingham == pytest.approx(3 * 5 * 2 / 2 * (1 - 1 / 3))
    assert found.bingham_p == pytest.approx(stats.chi2.sf(10, 5))
    assert found.log_potential == pytest.approx(-2 * 4)
    alike = sphere.measure(poles[:1].repeat(10, 1))
    assert (alike.resultant, alike.rayleigh, alike.log_potential) == pytest.approx((1, 30, 0))
    assert alike.rayleigh_p == pytest.approx(stats.chi2.sf(30, 3))


def test_vectors_need_not_be_of_unit_length_and_one_is_too_few() -> None:
    z = even(50, 4)
    assert sphere.measure(z * 7.0).model_dump() == pytest.approx(sphere.measure(z).model_dump())
    for bad in (z[:1], z[:, :1]):
        with pytest.raises(ValueError, match="do not fill a sphere"):
            sphere.measure(bad)


@pytest.mark.parametrize("dim", [2, 3, 5, 64, 4096])
def test_projections_have_the_beta_law(dim: int) -> None:
    t = torch.linspace(-1, 1, 201, dtype=torch.float64) * min(1.0, 8 / math.sqrt(dim))
    half = (dim - 1) / 2
    expected = torch.from_numpy(stats.beta.cdf((1 + t.numpy()) / 2, half, half))
    assert (sphere.projection_cdf(t, dim) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("distance", "num"), [(0.01, 1000), (0.03, 1000), (0.1, 50), (0.2, 50), (0.5, 20), (0.0, 9)])
def test_the_chance_of_a_distance_is_that_of_the_exact_law(distance: float, num: int) -> None:
    expected = float(stats.kstwo.sf(distance, num)) if distance else 1.0
    assert sphere.kolmogorov_tail(distance, num) == pytest.approx(expected, abs=0.02)


def test_the_potential_of_an_even_circle_is_a_bessel_function() -> None:
    from scipy.special import iv

    assert sphere.log_potential_if_even(2) == pytest.approx(math.log(iv(0, 4.0)) - 4)
