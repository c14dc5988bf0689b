from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from service.contract.losses import Critic, InfoNCE, KSample, Loss, Sigmoid, Square
from worker.learning import critics, losses
from worker.learning.losses import Gathered

CRITICS: tuple[Critic, ...] = get_args(Critic)
ALL: list[Loss] = [
    *(
        kind(critic=critic, attract=attract)
        for kind in (InfoNCE, KSample, Sigmoid)
        for critic in CRITICS
        for attract in (0, 0.7)
    ),
    Square(),
]


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z_a, z_b = torch.randn(2, 20, 6, dtype=torch.float64, generator=generator).unbind()
    return z_a, z_b, torch.tensor(2.0).double(), torch.tensor(-3.0).double()


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_processes_that_share_a_batch_learn_what_one_learns(loss: Loss) -> None:
    """Gradients of gathered vectors are summed over the processes, those of scale and bias averaged."""
    z_a, z_b, scale, bias = (each.requires_grad_() for each in batch())
    whole = losses.compute(loss, z_a, z_b, scale, bias)
    leaves = [z_a, z_b, scale, bias]
    parts: list[Tensor] = []
    for start in (0, 5, 10, 15):
        mine = slice(start, start + 5)
        gathered = Gathered(z_a, z_b, start)
        parts.append(losses.compute(loss, z_a[mine], z_b[mine], scale, bias, gathered=gathered))
    together = torch.stack(parts).mean()
    torch.testing.assert_close(together, whole)
    # A loss that does not take a leaf has no gradient there.
    torch.testing.assert_close(
        torch.autograd.grad(together, leaves, materialize_grads=True),
        torch.autograd.grad(whole, leaves, materialize_grads=True),
    )


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("kind", [InfoNCE, KSample, Sigmoid])
def test_pulling_positives_takes_their_mean_score_off_whatever_the_scale(
    kind: type[InfoNCE | KSample | Sigmoid], critic: Critic
) -> None:
    z_a, z_b, scale, bias = batch()
    plain = losses.compute(kind(critic=critic), z_a, z_b, scale, bias)
    pulled = losses.compute(kind(critic=critic, attract=0.25), z_a, z_b, scale, bias)
    torch.testing.assert_close(plain - pulled, 0.25 * critics.paired_scores(critic, z_a, z_b).mean())


@pytest.mark.parametrize("loss", [InfoNCE(), KSample(), Sigmoid()], ids=str)
def test_half_precision_vectors_are_compared_in_single_precision(loss: Loss) -> None:
    z_a, z_b, scale, bias = (each.float() for each in batch())
    half = losses.compute(loss, z_a.bfloat16(), z_b.bfloat16(), scale, bias)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, losses.compute(loss, z_a.bfloat16().float(), z_b.bfloat16().float(), scale, bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.compute(loss, z_a, z_b, scale, bias), losses.compute(loss, z_a, z_b, scale, bias))
        inside = losses.compute(loss, z_a, z_b, scale, bias)
    assert torch.equal(inside, losses.compute(loss, z_a, z_b, scale, bias))


@pytest.mark.parametrize("loss", [InfoNCE(critic="squared_distance"), Sigmoid(critic="squared_distance")], ids=str)
def test_distances_do_not_mind_where_the_origin_is(loss: Loss) -> None:
    z_a, z_b, scale, bias = batch()
    moved = losses.compute(loss, z_a + 3, z_b + 3, scale, bias)
    torch.testing.assert_close(moved, losses.compute(loss, z_a, z_b, scale, bias))
