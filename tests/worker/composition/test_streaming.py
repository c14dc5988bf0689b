from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from service.contract.losses import Critic
from worker.composition import streaming
from worker.composition.streaming import Link, Masses, log_matmul


def vectors(critic: Critic, rows: int, dim: int, seed: int) -> Tensor:
    z = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(z, dim=1) if critic == "cosine" else z


def term_by_term(log_mass: Tensor, f: Tensor) -> Tensor:
    return torch.stack([(row[:, None] + f.double()).logsumexp(0) for row in log_mass])


@pytest.mark.parametrize("critic", ["cosine", "dot", "squared_distance"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0, 60.0, 61.0, 100.0])
def test_a_stream_is_the_sum_term_by_term(critic: Critic, scale: float) -> None:
    """Also at scales whose scores span far more than float32 does."""
    link = Link(critic, scale)
    source, bridge, target = (vectors(critic, rows, 4, rows) for rows in (5, 2100, 70))
    log_mass = link.scores(source, bridge).double()
    found = Masses(log_mass, link, bridge).log_products(target)
    # Rounding of the scores themselves is what is left.
    tolerance = 1e-6 * max(10.0, float(link.scores(bridge, target).abs().max()))
    torch.testing.assert_close(found, term_by_term(log_mass, link.scores(bridge, target)), atol=tolerance, rtol=0)


@pytest.mark.parametrize("scale", [50.0, 100.0])
def test_opposite_peaks_stay_finite(scale: float) -> None:
    """The source likes one item, the target the opposite one: every product underflows, the sum is a number."""
    link = Link("cosine", scale)
    axis = torch.tensor([[1.0, 0.0]])
    bridge = torch.cat([axis, -axis])
    log_mass = 3 * link.scores(axis, bridge).double()
    found = Masses(log_mass, link, bridge).log_products(-axis)
    assert float(found) == pytest.approx(math.log(math.exp(2 * scale) + math.exp(-2 * scale)), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    block=st.integers(1, 40),
    sources=st.integers(1, 4),
    bridge=st.integers(1, 30),
    targets=st.integers(1, 30),
    scale=st.sampled_from([0.5, 30.0, 90.0]),
)
def test_no_size_of_a_block_changes_the_sum(
    rows: int, block: int, sources: int, bridge: int, targets: int, scale: float
) -> None:
    link = Link("cosine", scale)
    z_source, z_bridge, z_target = (
        vectors("cosine", num, 3, seed) for seed, num in enumerate((sources, bridge, targets))
    )
    log_mass = link.scores(z_source, z_bridge).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "ROWS", rows)
        patch.setattr(streaming, "BLOCK_SCORES", {"cpu": block})
        patch.setattr(streaming, "ROWS_AT_ONCE", block)
        found = Masses(log_mass, link, z_bridge).log_products(z_target)
    expected = term_by_term(log_mass, link.scores(z_bridge, z_target))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_items_without_mass_count_for_nothing() -> None:
    link = Link("cosine", 30.0)
    source, bridge, target = (vectors("cosine", rows, 4, rows) for rows in (3, 50, 7))
    log_mass = link.scores(source, bridge).double()
    log_mass[:, 20:] = -math.inf
    found = Masses(log_mass, link, bridge).log_products(target)
    torch.testing.assert_close(
        found, Masses(log_mass[:, :20], link, bridge[:20]).log_products(target), atol=1e-5, rtol=0
    )


def test_memory_holds_a_block_and_not_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor that is made has as many entries as the bridge has scores with the targets."""
    largest = 0
    real = torch.mm

    def seen(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, out.untyped_storage().nbytes() // 4)
        return real(a, b, out=out)

    monkeypatch.setattr(streaming.torch, "mm", seen)
    link = Link("cosine", 30.0)
    bridge, target = vectors("cosine", 5000, 4, 0), vectors("cosine", 4000, 4, 1)
    Masses(link.scores(target[:2], bridge).double(), link, bridge).log_products(target)
    assert 0 < largest <= 1 << 20


def test_products_below_the_range_of_float64_are_taken_one_by_one() -> None:
    a = torch.tensor([[0.0, -2000.0]], dtype=torch.float64)
    b = torch.tensor([[-1990.0], [0.0]], dtype=torch.float64)
    assert float(log_matmul(a, b)) == pytest.approx(-1990.0 + math.log1p(math.exp(-10.0)))
