from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from worker.theory import generators


def _own(generator: generators.Generator, side: str, num: int) -> np.ndarray:
    """The modality's own features of fresh items, recovered through the dictionary; shape (item, own)."""
    rng = np.random.default_rng(1)
    z = np.repeat(np.arange(generator.num_classes), num // generator.num_classes)
    drawn = generator.x_of(z, rng) if side == "x" else generator.y_of(z, rng)
    mixing = generator.mixing_x if side == "x" else generator.mixing_y
    return (drawn.numpy() @ np.linalg.pinv(mixing).T)[:, generator.codes.shape[1] :]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("margin", [0.4, 0.5])
def test_codes_are_unit_vectors_and_the_closest_two_are_exactly_the_margin_apart(seed: int, margin: float) -> None:
    generator = generators.case_study(seed, own_norm=4.0, margin=margin)
    assert np.allclose(np.linalg.norm(generator.codes, axis=1), 1, atol=1e-12)
    assert generator.margin == pytest.approx(margin, abs=1e-12)


def test_codes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "_MAX_DRAWS", 20)
    with pytest.raises(ValueError, match="50 random directions of dimension 4"):
        generators.spread_codes(50, 4, 0.9, np.random.default_rng(0))


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("mean_norm", [0.0, 2.0])
def test_own_features_are_never_longer_than_r(side: str, mean_norm: float) -> None:
    generator = generators.case_study(0, own_norm=4.0, mean_norm=mean_norm)
    norms = np.linalg.norm(_own(generator, side, 2000), axis=1)
    assert norms.max() <= 4.0 + 1e-9
    assert norms.max() > 3.5
    if mean_norm == 0:
        assert norms.min() >= generators.SHORTEST * 4.0 - 1e-9


def test_the_mean_of_zeta_given_the_class_is_what_was_asked_for_and_that_of_xi_is_zero() -> None:
    generator = generators.case_study(0, own_norm=4.0, mean_norm=2.0, num_classes=4)
    zeta = _own(generator, "y", 40_000).reshape(4, -1, 16).mean(1)
    assert np.allclose(zeta, generator.means, atol=0.04)
    assert np.allclose(np.linalg.norm(generator.means, axis=1), 2)
    assert np.allclose(_own(generator, "x", 40_000).reshape(4, -1, 16).mean(1), 0, atol=0.08)


def test_x_and_y_are_independent_given_the_class() -> None:
    generator = generators.case_study(0, own_norm=4.0)
    rng = np.random.default_rng(0)
    z = np.zeros(20_000, dtype=np.int64)
    x, y = generator.x_of(z, rng).numpy(), generator.y_of(z, rng).numpy()
    correlations = np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :]
    assert np.abs(correlations).max() < 5 / np.sqrt(len(z))


def test_the_dictionaries_have_independent_columns_and_are_orthonormal_on_request() -> None:
    plain, orthonormal = (generators.case_study(0, own_norm=1.0, orthonormal=each) for each in (False, True))
    for generator in (plain, orthonormal):
        for mixing in (generator.mixing_x, generator.mixing_y):
            assert np.linalg.matrix_rank(mixing) == mixing.shape[1]
    assert np.allclose(orthonormal.mixing_x.T @ orthonormal.mixing_x, np.eye(48), atol=1e-12)
    assert not np.allclose(plain.mixing_x.T @ plain.mixing_x, np.eye(48), atol=0.1)


def test_the_oracle_sees_the_inner_products_of_the_codes_and_nothing_else() -> None:
    generator = generators.case_study(3, own_norm=8.0)
    pairs = generator.draw(200, np.random.default_rng(0))
    codes = torch.from_numpy(generator.codes)[pairs.z]
    assert torch.allclose(generator.oracle(pairs.x, pairs.y), codes @ codes.T, atol=1e-11)


@pytest.mark.parametrize("make", [generators.fine_grained, generators.crowded])
def test_a_seed_gives_the_same_data_and_another_gives_others(
    make: Callable[[int], generators.Generator],
) -> None:
    first, again, other = (make(seed).draw(50, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.z, again.z)
    assert not torch.equal(first.y, other.y)


def test_the_case_study_of_a_seed_is_always_the_same() -> None:
    one, two = (generators.case_study(5, own_norm=2.0) for _ in range(2))
    assert np.array_equal(one.codes, two.codes)
    assert np.array_equal(one.mixing_y, two.mixing_y)


def test_sub_classes_are_close_within_a_cluster_and_far_from_other_clusters() -> None:
    generator = generators.fine_grained(0)
    assert generator.num_classes == 96
    between = (generator.codes @ generator.codes.T).reshape(12, 8, 12, 8)
    within = np.array([between[at, :, at][~np.eye(8, dtype=bool)] for at in range(12)])
    assert 0.8 < within.mean() < 0.95
    assert abs(np.array([between[a, :, b] for a, b in pairwise(range(12))]).mean()) < 0.2
    assert generators.crowded(0).num_classes == 300
