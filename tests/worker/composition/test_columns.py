from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.contract.losses import Critic
from worker.composition.chains import Bridge, Chain
from worker.composition.columns import Columns
from worker.composition.streaming import Link


def vectors(critic: Critic, rows: int, dim: int, seed: int) -> Tensor:
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(z, dim=1) if critic == "cosine" else z


def a_chain(critic: Critic, scale: float, *, weighted: bool = False, normalise: bool = True) -> Chain:
    left, right = vectors(critic, 200, 4, 1), vectors(critic, 150, 4, 2)
    right = torch.cat([right, right[40:90]])  # as in a bank that was drawn with replacement
    weights = torch.rand(200, generator=torch.Generator().manual_seed(3)) if weighted else None
    return Chain((Link(critic, scale), Link(critic, scale)), (Bridge(left, right, weights),), normalise=normalise)


def kept(chain: Chain, z_target: Tensor, probe: Tensor, *, width: int = 7) -> Columns:
    bridge = chain.bridges[0]
    columns = Columns(bridge, probe, num_targets=len(z_target), normalise=chain.normalise)
    for block in z_target.split(width):
        columns.add(chain.links[1], block)
    return columns


@pytest.mark.parametrize("critic", ["cosine", "dot", "squared_distance"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_what_is_kept_answers_as_the_sum_itself(critic: Critic, weighted: bool, normalise: bool) -> None:
    chain = a_chain(critic, 3.0, weighted=weighted, normalise=normalise)
    z_target, probe = vectors(critic, 30, 4, 4), torch.tensor([0, 6, 7, 29])
    masses = chain.masses(vectors(critic, 5, 4, 5))
    expected = chain.weigh(masses, z_target)
    columns = kept(chain, z_target, probe)
    placed = columns.place(masses[0])
    total = torch.cat([columns.sums(placed, chosen) for chosen in (slice(0, 11), slice(11, 30))], 1)
    look = columns.look(placed, total)
    assert look is not None
    torch.testing.assert_close(look.log_ratio, expected.log_ratio, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        look.effective_sample_size, expected.effective_sample_size[:, probe], atol=1e-4, rtol=1e-4
    )
    chosen = torch.tensor([3, 28])
    found = columns.weigh(masses[0], chosen)
    assert found is not None
    for name in ("log_ratio", "standard_error", "bias", "effective_sample_size"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name)[:, chosen], atol=1e-4, rtol=1e-4)
    assert columns.num_bytes == 4 * 150 * (30 + 4 + 4)


def test_sums_that_float32_cannot_hold_are_not_answered() -> None:
    """The source likes one item, the target the opposite one."""
    axis = torch.tensor([[1.0, 0.0]])
    bridge = Bridge(torch.cat([axis, -axis]), torch.cat([axis, -axis]))
    chain = replace(a_chain("cosine", 100.0), bridges=(bridge,))
    columns = kept(chain, -axis, torch.tensor([0]))
    log_mass = chain.start(axis)
    placed = columns.place(log_mass)
    assert columns.look(placed, columns.sums(placed, slice(0, 1))) is None
    assert columns.weigh(log_mass, torch.tensor([0])) is None
    assert math.isfinite(float(chain.weigh([log_mass], -axis).log_ratio))
