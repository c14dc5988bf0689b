from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from worker.theory import gaussian

DIMS = (5, 3, 4)


@pytest.mark.parametrize("legs", ["first_leg", "second_leg", "whole"])
def test_a_ratio_is_that_of_the_densities(legs: str) -> None:
    law = gaussian.views(0, DIMS, noise=0.7, bypass=0.3)
    drawn = law.draw(6, np.random.default_rng(0))
    parts = {"a": slice(0, 5), "b": slice(5, 8), "c": slice(8, 12)}
    x, y = {"first_leg": "ab", "second_leg": "bc", "whole": "ac"}[legs]
    values = {"a": drawn.a, "b": drawn.b, "c": drawn.c}
    found = getattr(law, legs).scores(values[x], values[y])

    def log_density(names: str, value: torch.Tensor) -> float:
        at = np.concatenate([np.arange(12)[parts[name]] for name in names])
        covariance = law.covariance[np.ix_(at, at)]
        density = multivariate_normal(law.mean[at], covariance)  # pyright: ignore[reportArgumentType]
        return float(density.logpdf(value.numpy()))

    for i in range(6):
        for j in range(6):
            u, v = values[x][i], values[y][j]
            wanted = log_density(x + y, torch.cat([u, v])) - log_density(x, u) - log_density(y, v)
            assert float(found[i, j]) == pytest.approx(wanted, abs=1e-8)


def test_draws_have_the_law_and_the_mean_ratio_is_the_information() -> None:
    law = gaussian.views(1, DIMS, noise=1.0, bypass=0.5)
    drawn = law.draw(40_000, np.random.default_rng(1))
    values = torch.cat([drawn.a, drawn.b, drawn.c], 1).numpy()
    assert np.abs(values.mean(0) - law.mean).max() < 0.08
    assert np.abs(np.cov(values.T) - law.covariance).max() < 0.15
    few = 300
    mean = np.mean(
        [
            float(law.whole.scores(drawn.a[i : i + few], drawn.c[i : i + few]).diagonal().mean())
            for i in range(0, 30_000, few)
        ]
    )
    assert mean == pytest.approx(law.whole.information, abs=0.05)


def test_views_are_what_they_are_said_to_be() -> None:
    """With the same seed a bypass changes only how much of each source is seen."""
    plain, mixed, other = (gaussian.views(2, DIMS, noise=0.5, bypass=rho) for rho in (0.0, 0.25, 1.0))
    a, b, c = slice(0, 5), slice(5, 8), slice(8, 12)
    noise = 0.25 * np.eye(5)
    assert np.allclose(mixed.covariance[b, b], plain.covariance[b, b])
    assert np.allclose(mixed.covariance[a, b], math.sqrt(0.75) * plain.covariance[a, b])
    assert np.allclose(
        mixed.covariance[a, a] - noise,
        0.75 * (plain.covariance[a, a] - noise) + 0.25 * (other.covariance[a, a] - noise),
    )
    assert np.allclose(mixed.covariance[a, c], 0.75 * plain.covariance[a, c] + 0.25 * other.covariance[a, c])
    assert np.allclose(other.covariance[a, b], 0)
    ridged = gaussian.views(2, DIMS, noise=0.5, ridge=0.05)
    assert np.allclose(ridged.covariance[b, b] - plain.covariance[b, b], 0.05 * np.eye(3))


def test_without_a_bypass_composing_is_bayes_and_with_one_it_is_not() -> None:
    law = gaussian.views(3, DIMS, noise=1.0)
    drawn = law.draw(50, np.random.default_rng(0))
    assert torch.allclose(law.composed.scores(drawn.a, drawn.c), law.whole.scores(drawn.a, drawn.c), atol=1e-8)
    assert law.bypassed_information == pytest.approx(0, abs=1e-9)
    mixed = gaussian.views(3, DIMS, noise=1.0, bypass=0.5)
    assert mixed.bypassed_information > 0.2
    assert mixed.composed.information < mixed.whole.information
    blind = gaussian.views(3, DIMS, noise=1.0, bypass=1.0)
    assert torch.equal(blind.composed.scores(drawn.a, drawn.c), torch.zeros(50, 50).double()), "all scores are equal"


def test_the_bypassed_information_is_that_of_the_determinants() -> None:
    law = gaussian.views(4, DIMS, noise=1.0, bypass=0.4)

    def log_det(*parts: slice) -> float:
        at = np.concatenate([np.arange(12)[part] for part in parts])
        return float(np.linalg.slogdet(law.covariance[np.ix_(at, at)])[1])

    a, b, c = slice(0, 5), slice(5, 8), slice(8, 12)
    wanted = (log_det(a, b) + log_det(b, c) - log_det(b) - log_det(a, b, c)) / 2
    assert law.bypassed_information == pytest.approx(wanted, abs=1e-8)


def test_the_twin_has_the_same_pairs_and_no_bypass() -> None:
    law = gaussian.views(5, DIMS, noise=1.0, bypass=0.6)
    twin = law.without_bypass()
    a, b, c = slice(0, 5), slice(5, 8), slice(8, 12)
    for x, y in ((a, a), (b, b), (c, c), (a, b), (b, c)):
        assert np.array_equal(twin.covariance[x, y], law.covariance[x, y])
    assert twin.bypassed_information == pytest.approx(0, abs=1e-9)
    assert np.linalg.eigvalsh(twin.covariance).min() > 0


def test_lemma_1_is_the_sum_over_a_long_bridge() -> None:
    law = gaussian.views(6, (2, 1, 2), noise=1.5, bypass=0.3)
    rng = np.random.default_rng(0)
    drawn, bridge = law.draw(8, rng), law.draw(200_000, rng).b
    terms = law.first_leg.scores(drawn.a, bridge)[:, None] + law.second_leg.scores(bridge, drawn.c).T
    summed = terms.logsumexp(2) - math.log(len(bridge))
    assert torch.allclose(summed, law.composed.scores(drawn.a, drawn.c), atol=0.05)
