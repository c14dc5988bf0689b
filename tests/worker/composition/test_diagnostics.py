from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from worker.composition.diagnostics import ranks, resultant, spearman


def test_the_resultant_is_one_for_vectors_alike_and_small_for_vectors_everywhere() -> None:
    assert resultant(torch.tensor([[0.6, 0.8]]).repeat(10, 1)) == pytest.approx(1.0)
    everywhere = functional.normalize(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert resultant(everywhere) < 0.02


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert ranks(torch.tensor([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[2.5, 0.0, 2.5, 1.0]]


def test_rank_correlation_sees_order_and_nothing_else() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert spearman(a, a.exp()).tolist() == pytest.approx([1.0])
    assert spearman(a, -a).tolist() == pytest.approx([-1.0])
    # 1 - 6 sum d^2 / (n (n^2 - 1)) for ranks 1 2 3 4 against 2 1 4 3
    assert spearman(a, torch.tensor([[2.0, 1.0, 4.0, 3.0]])).tolist() == pytest.approx([1 - 6 * 4 / 60])


def test_a_row_that_does_not_vary_has_no_correlation() -> None:
    assert math.isnan(float(spearman(torch.ones(1, 3), torch.tensor([[1.0, 2.0, 3.0]]))))
