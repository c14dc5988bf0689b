from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from worker.learning.retrieval import at_ks, by_critic, by_nothing, classes, hits_at_k


def enumerate_hits(scores: list[float], relevant: list[bool], k: int) -> tuple[float, float]:
    """Average over every order that agrees with the scores."""
    hits, shares, count = 0.0, 0.0, 0
    for order in itertools.permutations(range(len(scores))):
        ranked = [scores[at] for at in order]
        if ranked == sorted(ranked, reverse=True):
            found = [relevant[at] for at in order[:k]]
            hits, shares, count = hits + any(found), shares + sum(found) / k, count + 1
    return hits / count, shares / count


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_ties_are_averaged_over_every_order(k: int) -> None:
    rng = np.random.default_rng(k)
    for _ in range(20):
        scores = rng.integers(0, 3, 6).astype(float).tolist()
        relevant = (rng.random(6) < 0.4).tolist()
        hit, precision = hits_at_k(torch.tensor([scores]), torch.tensor([relevant]), k)
        expected = enumerate_hits(scores, relevant, k)
        assert (float(hit), float(precision)) == pytest.approx(expected)


def test_scores_that_know_nothing_get_chance_and_not_one() -> None:
    one_each = torch.arange(50)
    recall, _ = at_ks(by_nothing(50, 50), one_each, one_each, [1, 10])
    assert recall == pytest.approx({1: 1 / 50, 10: 10 / 50})


def test_the_right_order_gets_one() -> None:
    z = torch.eye(20)
    recall, precision = at_ks(by_critic("cosine", z, z), torch.arange(20), torch.arange(20), [1, 5])
    assert recall == pytest.approx({1: 1.0, 5: 1.0})
    assert precision == pytest.approx({1: 1.0, 5: 0.2})


def test_k_beyond_the_targets_means_all_of_them() -> None:
    z = torch.eye(3)
    recall, precision = at_ks(by_critic("cosine", z, z), torch.arange(3), torch.tensor([0, 1, 1]), [10])
    assert recall[10] == pytest.approx(2 / 3)  # nothing is of class 2
    assert precision[10] == pytest.approx((1 / 3 + 2 / 3) / 3)


def test_more_queries_than_fit_at_once_give_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    z_query, z_target = torch.randn(1500, 4, generator=generator), torch.randn(30, 4, generator=generator)
    labels = torch.arange(1500) % 5
    whole, _ = at_ks(by_critic("cosine", z_query, z_target), labels, torch.arange(30) % 5, [1])
    hit, _ = hits_at_k(z_query @ z_target.T, labels[:, None] == torch.arange(30) % 5, 1)
    assert whole[1] == pytest.approx(float(hit.mean()))


def test_equal_values_get_equal_numbers_across_lists() -> None:
    first, second = classes(["a", "b", "a"], ["b", "c"])
    assert first.tolist() == [0, 1, 0]
    assert second.tolist() == [1, 2]
