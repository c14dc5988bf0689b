from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from worker.composition.chains import Bridge, Chain, Ending
from worker.composition.estimators import marginal
from worker.composition.search import LOG_PRIOR_FLOOR, Ranking, top_k
from worker.composition.streaming import Link

LINKS = (Link("cosine", 12.0), Link("cosine", 30.0))


def unit(rows: int, dim: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def question(sources: int, bridge: int, targets: int) -> tuple[Chain, Tensor, Tensor]:
    chain = Chain(LINKS, (Bridge(unit(bridge, 4, 0), unit(bridge, 3, 1)),))
    return chain, unit(sources, 4, 2), unit(targets, 3, 3)


def dense(chain: Chain, source: Tensor, target: Tensor) -> Tensor:
    bridge = chain.bridges[0]
    f_source, f_target = LINKS[0].scores(source, bridge.left), LINKS[1].scores(bridge.right, target)
    return marginal(f_source, f_target, normalise=True).log_ratio


@settings(max_examples=25, deadline=None)
@given(block=st.integers(1, 17), k=st.integers(1, 25), bridge=st.integers(1, 30), targets=st.integers(1, 20))
def test_blocks_of_targets_give_what_all_at_once_would(block: int, k: int, bridge: int, targets: int) -> None:
    """Also for one target, one bridge item, and more asked for than there are."""
    chain, source, target = question(3, bridge, targets)
    found = top_k(Ending(chain, chain.start(source)), target.split(block), k)
    expected = dense(chain, source, target)
    best = expected.sort(dim=1, descending=True).values[:, :k]
    torch.testing.assert_close(found.score, best, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.score, expected.gather(1, found.index), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.log_normaliser, expected.logsumexp(1), atol=1e-4, rtol=0)
    assert all(len(set(row)) == len(row) for row in found.index.tolist())


def test_targets_come_from_a_memory_map_as_well(tmp_path: object) -> None:
    chain, source, target = question(2, 40, 100)
    path = f"{tmp_path}/z.npy"
    np.save(path, target.numpy())
    z = np.load(path, mmap_mode="r")
    blocks = (torch.from_numpy(np.array(z[begin : begin + 7])) for begin in range(0, 100, 7))
    found = top_k(Ending(chain, chain.start(source)), blocks, 5)
    torch.testing.assert_close(found.index, dense(chain, source, target).topk(5).indices)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_of_equal_targets_the_earlier_is_first_whatever_comes_first(order: list[int]) -> None:
    ranking = Ranking(1, 4)
    blocks = [torch.tensor([[1.0, 3.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([[1.0, 3.0]])]
    for at in order:
        ranking.add(2 * at, blocks[at])
    assert ranking.best().index.tolist() == [[1, 2, 3, 5]]


def test_a_prior_weighs_and_one_of_zero_ranks_last_and_stays_a_number() -> None:
    chain, source, target = question(2, 40, 6)
    log_prior = torch.tensor([0.1, 0.0, 0.5, 0.4, 0.0, 0.0], dtype=torch.float64).log()
    found = top_k(Ending(chain, chain.start(source)), target.split(4), 6, log_prior=log_prior)
    ratio = dense(chain, source, target)
    torch.testing.assert_close(found.log_normaliser, (ratio + log_prior).logsumexp(1), atol=1e-4, rtol=0)
    assert {tuple(sorted(row[3:])) for row in found.index.tolist()} == {(1, 4, 5)}
    assert bool(torch.isfinite(found.rank).all())
    assert float(found.rank[:, 3:].max()) < LOG_PRIOR_FLOOR / 2


def test_a_prior_of_another_length_and_no_targets_are_refused() -> None:
    chain, source, target = question(2, 10, 6)
    ending = Ending(chain, chain.start(source))
    for num in (5, 7):
        with pytest.raises(ValueError, match="priors for"):
            top_k(ending, target.split(2), 3, log_prior=torch.zeros(num, dtype=torch.float64))
    with pytest.raises(ValueError, match="0 targets"):
        top_k(ending, [], 3)
    with pytest.raises(ValueError, match="at least 1"):
        Ranking(1, 0)


def test_a_block_without_anything_better_still_counts_in_the_sum() -> None:
    ranking = Ranking(1, 1)
    ranking.add(0, torch.tensor([[5.0]]))
    ranking.add(1, torch.tensor([[1.0, 2.0]]))
    assert ranking.best().index.tolist() == [[0]]
    expected = math.log(sum(math.exp(each) for each in (5.0, 1.0, 2.0)))
    assert float(ranking.best().log_normaliser) == pytest.approx(expected)
