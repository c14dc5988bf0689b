from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional

from service.contract.losses import Critic
from service.inference import critics as of_the_service
from worker.learning import critics

CRITICS: tuple[Critic, ...] = get_args(Critic)


def vectors(num: int, seed: int) -> torch.Tensor:
    return torch.randn(num, 7, generator=torch.Generator().manual_seed(seed))


def test_scores_are_what_they_are_called() -> None:
    a, b = vectors(5, 1), vectors(6, 2)
    unit = [critics.prepare("cosine", z) for z in (a, b)]
    torch.testing.assert_close(
        critics.scores("cosine", *unit), functional.cosine_similarity(a[:, None], b[None], dim=2)
    )
    torch.testing.assert_close(critics.scores("dot", a, b), a @ b.T)
    torch.testing.assert_close(critics.scores("squared_distance", a, b), -torch.cdist(a, b).square() / 2)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_service_compares_as_the_worker_does(critic: Critic) -> None:
    a, b = vectors(5, 1), vectors(6, 2)
    prepared = [of_the_service.prepare(critic, z.numpy()) for z in (a, b)]
    expected = [critics.prepare(critic, z) for z in (a, b)]
    for one, other in zip(prepared, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(of_the_service.scores(critic, *prepared), critics.scores(critic, *expected), atol=1e-5)


@pytest.mark.parametrize("critic", CRITICS)
def test_paired_scores_are_the_diagonal(critic: Critic) -> None:
    a, b = vectors(6, 1), vectors(6, 2)
    torch.testing.assert_close(critics.paired_scores(critic, a, b), critics.scores(critic, a, b).diagonal())


@pytest.mark.parametrize("critic", CRITICS)
def test_no_score_exceeds_the_largest(critic: Critic) -> None:
    for seed in range(20):
        a, b = (critics.prepare(critic, vectors(6, seed + at)) for at in (0, 100))
        largest = critics.largest_score(critic, a, b)
        assert critics.scores(critic, a, b).abs().max() <= largest * (1 + 1e-6)
    z = critics.prepare(critic, vectors(1, 0))
    torch.testing.assert_close(critics.scores(critic, z, -z).abs()[0, 0], critics.largest_score(critic, z, z))
