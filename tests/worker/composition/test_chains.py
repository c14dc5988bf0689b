"""Chains against the exact answer of a discrete model, in which every step is a table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from worker.composition.chains import Bridge, Chain, Ending, Offsets, balance
from worker.composition.estimators import marginal
from worker.composition.search import top_k
from worker.composition.streaming import Link

LINKS = (Link("dot", 1.0),) * 3


def table(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return p(row | column)."""
    found = torch.rand(rows, columns, generator=generator, dtype=torch.float64).pow(2) + 1e-3
    return found / found.sum(0)


@dataclass(frozen=True)
class Discrete:
    """a -> b -> c -> d over 7, 30, 25 and 9 values: p(b), p(c), the log-ratios of each step, and of the whole."""

    p_b: Tensor
    p_c: Tensor
    f: tuple[Tensor, Tensor, Tensor]
    exact: Tensor

    def bridges(
        self, at_b: Tensor, at_c: Tensor, weights: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Bridge, Bridge]:
        """Return bridges of some values of b and c, as inner products of rows of a table with unit vectors."""
        first, inner, _ = self.f
        return (
            Bridge(first.T[at_b].float(), torch.eye(len(self.p_b))[at_b], weights[0]),
            Bridge(inner.T[at_c].float(), torch.eye(len(self.p_c))[at_c], weights[1]),
        )

    @property
    def sources(self) -> Tensor:
        return torch.eye(len(self.f[0]))

    @property
    def targets(self) -> Tensor:
        return self.f[2].T.float().contiguous()


@pytest.fixture(scope="module")
def model() -> Discrete:
    generator = torch.Generator().manual_seed(3)
    p_b = table(30, 1, generator)[:, 0]
    a_b, c_b, d_c = table(7, 30, generator), table(25, 30, generator), table(9, 25, generator)
    p_a, p_c = a_b @ p_b, c_b @ p_b
    p_d = d_c @ p_c
    f = (a_b / p_a[:, None]).log(), (c_b / p_c[:, None]).T.log(), (d_c / p_d[:, None]).T.log()
    exact = ((a_b * p_b) @ c_b.T @ d_c.T / (p_a[:, None] * p_d)).log()
    return Discrete(p_b, p_c, f, exact)


def everything(model: Discrete) -> tuple[Bridge, Bridge]:
    return model.bridges(torch.arange(30), torch.arange(25), (model.p_b, model.p_c))


@pytest.mark.parametrize("normalise", [False, True])
def test_over_all_values_a_chain_is_the_exact_answer(model: Discrete, normalise: bool) -> None:
    """Lemma 1, link by link; the scores are float32, so that is what is left of the difference."""
    bridges = everything(model)
    offsets = (balance(LINKS[1], *bridges),) if normalise else ()
    chain = Chain(LINKS, bridges, offsets, normalise)
    masses = chain.masses(model.sources)
    for found in (Ending(chain, masses[-1]).log_ratios(model.targets), chain.weigh(masses, model.targets).log_ratio):
        assert float((found - model.exact).abs().max()) <= 2e-6 if not normalise else 2e-3


def test_offsets_of_every_item_of_every_link_change_nothing(model: Discrete) -> None:
    """InfoNCE leaves them free; those within the chain are found from what a ratio must fulfil."""
    generator = torch.Generator().manual_seed(4)
    bridges = everything(model)
    chain = Chain(LINKS, bridges, (balance(LINKS[1], *bridges),))
    plain = chain.weigh(chain.masses(model.sources), model.targets).log_ratio
    first, inner, last = model.f
    moved_f = (
        first + torch.randn(7, 1, generator=generator),
        inner + torch.randn(30, 1, generator=generator) + torch.randn(1, 25, generator=generator),
        last + torch.randn(1, 9, generator=generator),
    )
    moved = Discrete(model.p_b, model.p_c, moved_f, model.exact)
    bridges = everything(moved)
    offsets = balance(LINKS[1], *bridges)
    assert offsets.deviation <= 1e-3
    chain = Chain(LINKS, bridges, (offsets,))
    found = chain.weigh(chain.masses(moved.sources), moved.targets).log_ratio
    assert float((found - plain).abs().max()) <= 5e-3
    careless = Chain(LINKS, bridges, (Offsets(torch.zeros(30), torch.zeros(25), 0.0),))
    found = careless.weigh(careless.masses(moved.sources), moved.targets).log_ratio
    assert float((found - plain).abs().max()) >= 0.05


def test_balance_makes_every_row_and_column_average_to_one(model: Discrete) -> None:
    generator = torch.Generator().manual_seed(5)
    f = torch.randn(30, 25, generator=generator).double()
    bridges = everything(Discrete(model.p_b, model.p_c, (model.f[0], f, model.f[2]), model.exact))
    found = balance(LINKS[1], *bridges)
    ratio = (f + found.first[:, None] + found.second).exp()
    p_b, p_c = (p / p.sum() for p in (model.p_b, model.p_c))
    torch.testing.assert_close(ratio @ p_c, torch.ones(30).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(p_b @ ratio, torch.ones(25).double(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("num", [100, 1000])
def test_two_standard_errors_cover_the_exact_answer_of_a_chain(model: Discrete, num: int) -> None:
    generator = torch.Generator().manual_seed(6)
    covered: list[Tensor] = []
    for _ in range(25):
        at_b, at_c = (torch.multinomial(p, num, replacement=True, generator=generator) for p in (model.p_b, model.p_c))
        bridges = model.bridges(at_b, at_c, (None, None))
        chain = Chain(LINKS, bridges, (balance(LINKS[1], *bridges),))
        found = chain.weigh(chain.masses(model.sources), model.targets)
        assert bool(found.trusted.all())
        covered.append((found.log_ratio - model.exact).abs() <= 2 * found.standard_error)
    assert 0.85 <= float(torch.stack(covered).double().mean()) <= 1.0


def test_a_chain_whose_links_are_sharp_is_not_trusted() -> None:
    """The worst bridge decides: one that carries the sum with few items spoils a chain, whatever the others do."""
    generator = torch.Generator().manual_seed(7)
    z = [torch.nn.functional.normalize(torch.randn(300, 8, generator=generator), dim=1) for _ in range(4)]
    bridges = Bridge(z[0], z[1]), Bridge(z[1], z[2])
    links = Link("cosine", 1.0), Link("cosine", 1.0), Link("cosine", 80.0)
    chain = Chain(links, bridges, (balance(links[1], *bridges),))
    found = chain.weigh(chain.masses(z[3][:5]), z[3][:40])
    assert not bool(found.trusted.any())
    alone = marginal(links[1].scores(z[3][:5], z[2]), links[2].scores(z[2], z[3][:40]), normalise=True)
    assert float((found.effective_sample_size / alone.effective_sample_size).median()) == pytest.approx(1.0, abs=0.2)


def test_one_bridge_is_what_marginal_says(model: Discrete) -> None:
    generator = torch.Generator().manual_seed(8)
    source, left, right, target = (torch.randn(num, 4, generator=generator) for num in (5, 60, 60, 8))
    weights = torch.rand(60, generator=generator)
    links = Link("dot", 0.7), Link("squared_distance", 0.4)
    chain = Chain(links, (Bridge(left, right, weights),))
    found = chain.weigh(chain.masses(source), target)
    expected = marginal(links[0].scores(source, left), links[1].scores(right, target), normalise=True, weights=weights)
    for name in ("log_ratio", "standard_error", "bias", "effective_sample_size"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_the_best_of_a_chain_are_found_block_by_block(model: Discrete) -> None:
    bridges = everything(model)
    chain = Chain(LINKS, bridges, (balance(LINKS[1], *bridges),))
    best = top_k(Ending(chain, chain.masses(model.sources)[-1]), model.targets.split(2), 3)
    torch.testing.assert_close(best.index, model.exact.topk(3).indices)
