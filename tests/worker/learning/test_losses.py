from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from worker.learning.losses import floor, info_nce


def unit(rows: int, dim: int, seed: int) -> Float[Tensor, "row dim"]:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def test_embeddings_that_are_all_alike_cost_log_batch() -> None:
    z = torch.ones(32, 4) / 2
    assert float(info_nce(z, z, torch.tensor(20.0))) == pytest.approx(math.log(32), abs=1e-5)


def test_aligned_embeddings_cost_almost_nothing() -> None:
    z = torch.eye(16)
    assert float(info_nce(z, z, torch.tensor(50.0))) < 1e-6


def test_swapping_the_sides_changes_nothing() -> None:
    a, b, scale = unit(24, 8, 1), unit(24, 8, 2), torch.tensor(7.0)
    torch.testing.assert_close(info_nce(a, b, scale), info_nce(b, a, scale))


def test_it_agrees_with_ten_plain_lines() -> None:
    a, b, scale = unit(9, 5, 3), unit(9, 5, 4), 6.0
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for i in range(9):
            scores = [scale * float(x[i] @ y[j]) for j in range(9)]
            total += math.log(sum(math.exp(score) for score in scores)) - scores[i]
    assert float(info_nce(a, b, torch.tensor(scale))) == pytest.approx(total / 18, abs=1e-5)


def test_batches_of_different_sizes_are_refused() -> None:
    with pytest.raises(TypeError):
        info_nce(unit(4, 3, 0), unit(5, 3, 0), torch.tensor(1.0))


@pytest.mark.parametrize(("batch", "classes", "both_directions"), [(64, 20, 2.649985), (32, 10, 2.633774)])
def test_the_floor_is_the_published_one(batch: int, classes: int, both_directions: float) -> None:
    """The published figures add the two directions; our loss is their mean."""
    assert 2 * floor(batch, np.full(classes, 100)) == pytest.approx(both_directions, abs=1e-5)


def test_the_floor_is_nothing_without_repeats_and_log_batch_with_nothing_else() -> None:
    assert floor(16, np.ones(100_000, int)) < 1e-3
    assert floor(16, np.array([50])) == pytest.approx(math.log(16))


def test_no_embedding_is_below_the_floor() -> None:
    """Perfect embeddings of drawn classes reach the floor, on average over batches."""
    rng = np.random.default_rng(0)
    z = torch.eye(8)
    losses = []
    for _ in range(300):
        classes = torch.from_numpy(rng.integers(0, 8, 16))
        losses.append(float(info_nce(z[classes], z[classes], torch.tensor(100.0))))
    assert np.mean(losses) == pytest.approx(floor(16, np.full(8, 10)), abs=0.02)
