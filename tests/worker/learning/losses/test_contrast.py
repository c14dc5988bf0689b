from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from service.contract.losses import Critic
from worker.learning import critics
from worker.learning.losses.contrast import info_nce, k_sample, one_sided_info_nce, sigmoid, square

CRITICS: tuple[Critic, ...] = get_args(Critic)


def unit(rows: int, dim: int, seed: int) -> Float[Tensor, "row dim"]:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def score(critic: Critic, x: Tensor, y: Tensor) -> float:
    return float(-((x - y) ** 2).sum() / 2) if critic == "squared_distance" else float(x @ y)


def test_embeddings_that_are_all_alike_cost_log_batch() -> None:
    z = torch.ones(32, 4) / 2
    assert float(info_nce("cosine", z, z, torch.tensor(20.0))) == pytest.approx(math.log(32), abs=1e-5)


def test_aligned_embeddings_cost_almost_nothing() -> None:
    z = torch.eye(16)
    assert float(info_nce("cosine", z, z, torch.tensor(50.0))) < 1e-6


@pytest.mark.parametrize("critic", CRITICS)
def test_swapping_the_sides_changes_nothing(critic: Critic) -> None:
    a, b, scale, bias = unit(24, 8, 1), unit(24, 8, 2) * 2, torch.tensor(7.0), torch.tensor(-3.0)
    torch.testing.assert_close(info_nce(critic, a, b, scale), info_nce(critic, b, a, scale))
    torch.testing.assert_close(sigmoid(critic, a, b, scale, bias), sigmoid(critic, b, a, scale, bias))


@pytest.mark.parametrize("critic", CRITICS)
def test_info_nce_agrees_with_ten_plain_lines(critic: Critic) -> None:
    a, b, scale = unit(9, 5, 3), unit(9, 5, 4), 6.0
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(9):
            scores = [scale * score(critic, x[i], y[j]) for j in range(9)]
            total += math.log(sum(math.exp(score) for score in scores)) - scores[i]
    assert float(info_nce(critic, a, b, torch.tensor(scale))) == pytest.approx(total / 18, abs=1e-5)


def test_the_default_loss_is_bit_for_bit_what_it_was() -> None:
    """Weights of earlier versions were trained with exactly these operations."""

    def as_it_was(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        logits, targets = scale * a @ b.T, torch.arange(len(a))
        return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2

    results: list[list[Tensor]] = []
    for compute in (as_it_was, lambda a, b, scale: info_nce("cosine", a, b, scale)):
        a, b, scale = unit(128, 64, 1).requires_grad_(), unit(128, 64, 2).requires_grad_(), torch.tensor(14.3)
        loss = compute(a, b, scale.requires_grad_())
        results.append([loss, *torch.autograd.grad(loss, [a, b, scale])])
    assert all(torch.equal(*each) for each in zip(*results, strict=True))


@pytest.mark.parametrize("critic", CRITICS)
def test_both_directions_of_info_nce_are_two_of_one_side(critic: Critic) -> None:
    a, b, scale = unit(10, 6, 3), unit(10, 6, 4), torch.tensor(5.0)
    both = (one_sided_info_nce(critic, a, b, scale) + one_sided_info_nce(critic, b, a, scale)) / 2
    torch.testing.assert_close(info_nce(critic, a, b, scale), both)


@pytest.mark.parametrize("critic", CRITICS)
def test_parts_of_the_anchors_against_all_candidates_add_up_to_the_whole(critic: Critic) -> None:
    a, b, scale, bias = unit(12, 6, 5), unit(12, 6, 6), torch.tensor(5.0), torch.tensor(-2.0)
    parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
    one_sided = torch.stack([one_sided_info_nce(critic, a[part], b, scale, offset=part.start) for part in parts]).mean()
    torch.testing.assert_close(one_sided, one_sided_info_nce(critic, a, b, scale))
    noes = torch.stack([sigmoid(critic, a[part], b, scale, bias, offset=part.start) for part in parts]).mean()
    torch.testing.assert_close(noes, sigmoid(critic, a, b, scale, bias))


@pytest.mark.parametrize("critic", CRITICS)
def test_the_sigmoid_loss_agrees_with_its_paper(critic: Critic) -> None:
    a, b, scale, bias = unit(9, 5, 3), unit(9, 5, 4), 6.0, -2.5
    total = 0.0
    for i in range(9):
        for j in range(9):
            sign = 1 if i == j else -1
            total += math.log(1 / (1 + math.exp(-sign * (scale * score(critic, a[i], b[j]) + bias))))
    assert float(sigmoid(critic, a, b, torch.tensor(scale), torch.tensor(bias))) == pytest.approx(-total / 9, abs=1e-5)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_k_sample_risk_agrees_with_plain_loops(critic: Critic) -> None:
    num, candidates, scale = 3, 4, 4.0
    a, b = unit(num * (candidates + 1), 5, 3), unit(num * (candidates + 1), 5, 4)
    total = 0.0
    for direction, (x, y) in enumerate(((a, b), (b, a))):
        for i in range(num):
            at = direction * num + i
            own = [2 * num + i + num * k for k in range(candidates - 1)]
            scores = [scale * score(critic, x[at], y[j]) for j in (at, *own)]
            total += (math.log(sum(map(math.exp, scores))) - scores[0]) / num
    assert float(k_sample(critic, a, b, torch.tensor(scale), candidates)) == pytest.approx(total, abs=1e-5)


def test_every_negative_of_the_k_sample_risk_belongs_to_one_anchor_of_each_direction() -> None:
    """Anchors are independent of each other: what changes one negative changes one term."""
    a, b = unit(20, 5, 3).requires_grad_(), unit(20, 5, 4).requires_grad_()
    k_sample("cosine", a, b, torch.tensor(4.0), 4).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.abs().sum(1) > 0).all()
    assert (b.grad.abs().sum(1) > 0).all()


def test_scores_that_know_nothing_cost_log_candidates_in_each_direction() -> None:
    z = torch.ones(25, 3)
    assert float(k_sample("dot", z, z, torch.tensor(2.0), 4)) == pytest.approx(2 * math.log(4), abs=1e-5)


def test_the_square_loss_is_the_mean_squared_distance() -> None:
    a, b = unit(7, 5, 3), unit(7, 5, 4)
    distances = -2 * critics.paired_scores("squared_distance", a, b)
    torch.testing.assert_close(square(a, b), distances.mean())


def test_batches_of_different_sizes_are_refused() -> None:
    with pytest.raises(TypeError):
        info_nce("cosine", unit(4, 3, 0), unit(5, 3, 0), torch.tensor(1.0))
