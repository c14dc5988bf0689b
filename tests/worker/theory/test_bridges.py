from __future__ import annotations

import numpy as np
import pytest
import torch

from worker.composition.diagnostics import resultant
from worker.theory import bridges


def test_clusters_have_the_length_that_is_asked_for_and_unit_vectors() -> None:
    for length in (0.0, 0.2, 0.6):
        points = bridges.clusters(3, 8, length).draw(20_000, np.random.default_rng(9))
        assert resultant(points) == pytest.approx(length, abs=0.015)
        assert torch.allclose(points.norm(dim=1), torch.ones(20_000).double())
    centres = bridges.clusters(3, 8, 0.5).centres
    assert np.allclose(centres @ centres.T, np.where(np.eye(3) == 1, 1, bridges.BETWEEN_CLUSTERS))


def test_points_without_concentration_are_even_in_every_direction() -> None:
    points = bridges.clusters(0, 6, 0.0).draw(50_000, np.random.default_rng(0))
    assert torch.allclose(points.T @ points / 50_000, torch.eye(6).double() / 6, atol=0.01)


def test_alphabets_are_distributions_and_the_joint_is_written_out() -> None:
    law = bridges.alphabets(0, (3, 4, 5))
    for each in (law.of_b, law.a_given_b, law.c_given_b, law.c_given_a):
        assert torch.allclose(each.sum(-1), torch.ones(each.shape[:-1]).double())
    wanted = sum(float(law.of_b[b]) * torch.outer(law.a_given_b[b], law.c_given_b[b]) for b in range(4))
    assert torch.allclose(law.joint, torch.as_tensor(wanted))
    assert torch.allclose(law.joint.sum(1), law.of_a)
    assert torch.allclose(law.joint.sum(0), law.of_c)
    b_given_a = (law.a_given_b * law.of_b[:, None]).T / law.of_a[:, None]
    assert torch.allclose(law.first_leg.exp() * law.of_b, b_given_a)
    assert torch.allclose(law.second_leg.exp() * law.of_c, law.c_given_b)


def test_information_is_nothing_where_b_says_nothing() -> None:
    law = bridges.alphabets(0, (3, 4, 5))
    blind = bridges.Alphabets(law.of_b, law.a_given_b[:1].expand(4, -1), law.c_given_b)
    assert blind.information == pytest.approx(0, abs=1e-12)
    assert 0 < law.information < np.log(3)


def test_drawn_pairs_are_as_frequent_as_they_are_probable() -> None:
    law = bridges.alphabets(1, (3, 4, 5))
    rng = np.random.default_rng(0)
    a, b = law.draw_first(200_000, rng)
    counts = torch.zeros(4, 3).double().index_put_((b, a), torch.ones(len(a)).double(), accumulate=True)
    assert torch.allclose(counts / len(a), law.of_b[:, None] * law.a_given_b, atol=0.005)
    b, c = law.draw_second(200_000, rng)
    counts = torch.zeros(4, 5).double().index_put_((b, c), torch.ones(len(c)).double(), accumulate=True)
    assert torch.allclose(counts / len(c), law.of_b[:, None] * law.c_given_b, atol=0.005)
    drawn = law.draw_b(200_000, rng).bincount(minlength=4)
    assert torch.allclose(drawn / drawn.sum(), law.of_b.float(), atol=0.005)
