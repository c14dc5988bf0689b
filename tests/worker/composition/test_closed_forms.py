"""Golden values and the sums that the closed forms stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.composition.closed_forms import Normal, fit_normal, gaussian, log_mean_exp_on_sphere, sphere
from worker.composition.diagnostics import spearman
from worker.composition.estimators import direct, marginal


def unit(rows: int, dim: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def at_cosine(dim: int, cosine: float) -> tuple[Tensor, Tensor]:
    a, c = torch.zeros(1, dim), torch.zeros(1, dim)
    a[0, 0] = 1.0
    c[0, 0], c[0, 1] = cosine, math.sqrt(1 - cosine**2)
    return a, c


@pytest.mark.parametrize(
    ("dim", "scale", "cosine", "expected"),
    [(6, 1.0, 0.5, 0.242669), (6, 1.0, -0.5, 0.082484), (16, 5.0, 0.0, 1.449217), (64, 10.0, 0.3, 1.973231)],
)
def test_the_sphere_has_its_golden_values(dim: int, scale: float, cosine: float, expected: float) -> None:
    found = sphere(*at_cosine(dim, cosine), (scale, scale), normalise=False)
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_in_three_dimensions_it_is_sinh() -> None:
    kappa = torch.tensor([1e-3, 0.5, math.sqrt(3), 20.0, 99.0, 101.0, 300.0], dtype=torch.float64)
    expected = (kappa.sinh() / kappa).log()
    torch.testing.assert_close(log_mean_exp_on_sphere(kappa, 3), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 64, 768, 4096])
def test_it_is_stable_from_nothing_to_huge_and_grows_all_the_way(dim: int) -> None:
    kappa = torch.cat([torch.zeros(1), torch.logspace(-8, 12, 2001)]).double()
    found = log_mean_exp_on_sphere(kappa, dim)
    assert float(found[0]) == 0.0
    assert bool(torch.isfinite(found).all())
    assert bool((found.diff() >= 0).all())
    torch.testing.assert_close(found[1:100], kappa[1:100].square() / (2 * dim), rtol=1e-6, atol=1e-15)
    # The two expansions meet.
    below, above = (log_mean_exp_on_sphere(torch.tensor([k], dtype=torch.float64), dim) for k in (100.0, 100.000001))
    assert -1e-10 <= float(above - below) <= 1e-6 + 1e-10


@pytest.mark.parametrize(("dim", "scales"), [(6, (1.0, 1.0)), (16, (1.0, 0.5)), (8, (2.0, 0.7))])
@pytest.mark.parametrize("normalise", [False, True])
def test_the_sphere_is_what_summing_over_an_even_bridge_comes_to(
    dim: int, scales: tuple[float, float], normalise: bool
) -> None:
    """Acceptance: root mean square at most .02, and at most .005 for scales up to 1."""
    bridge, a, c = unit(100_000, dim, 0), unit(10, dim, 1), unit(12, dim, 2)
    found = marginal(scales[0] * a @ bridge.T, scales[1] * bridge @ c.T, normalise=normalise, precise=False)
    error = found.log_ratio - sphere(a, c, scales, normalise=normalise)
    assert float(error.square().mean().sqrt()) <= 0.005 * max(scales) ** 2


def test_on_the_sphere_the_closed_form_ranks_as_comparing_does() -> None:
    a, c = unit(5, 8, 1), unit(40, 8, 2)
    for scales in ((3.0, 3.0), (20.0, 4.0)):
        order = spearman(sphere(a, c, scales, normalise=True), direct("cosine", a, c).double())
        torch.testing.assert_close(order, torch.ones_like(order), atol=1e-6, rtol=0)


def test_the_normal_bridge_has_its_golden_value() -> None:
    a, c = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.2, 0.6, 0.0]])
    c[0, 1] = math.sqrt(1 - 0.8**2)
    bridge = Normal(torch.zeros(3).double(), torch.eye(3).double(), torch.full((3,), 1.5).double())
    assert float(gaussian(a, c, (1.0, 1.0), bridge, normalise=False)) == pytest.approx(-2.441942, abs=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_normal_bridge_off_the_origin_and_of_many_widths_is_what_summing_comes_to(normalise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(3, 3, generator=generator)
    bridge = torch.randn(200_000, 3, generator=generator) @ mix + 1
    a, c = (torch.randn(num, 3, generator=generator) for num in (6, 7))
    f_source, f_target = -0.35 * torch.cdist(a, bridge) ** 2, -0.6 * torch.cdist(bridge, c) ** 2
    found = marginal(f_source, f_target, normalise=normalise)
    expected = gaussian(a, c, (0.7, 1.2), fit_normal(bridge), normalise=normalise)
    assert float((found.log_ratio - expected).abs().max()) <= 0.03
    assert float(((found.log_ratio - expected).abs() / found.standard_error).median()) <= 2


def test_a_normal_distribution_is_fitted_with_the_weights_of_its_items() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    weights = torch.tensor([0.5, 0.5, 0.0]).log()
    found = fit_normal(z, weights)
    torch.testing.assert_close(found.mean, torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(found.variances.sort().values, torch.tensor([0.0, 1.0]).double())
