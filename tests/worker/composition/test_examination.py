"""What two legs tell by themselves, on legs whose truth is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from worker.composition import examination
from worker.composition.examination import Leg, examine, judge_agreement, judge_offsets, offset_deviation


def noise(num: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


def leg(end: str, scale: float, seed: int, *, num: int = 1200, dim: int = 4, towards: float = 0.0) -> Leg:
    """Make unit vectors of which row i of both sides lie near each other, drawn towards one direction."""
    z = noise(num, dim, seed)
    z[:, 0] += towards
    z = functional.normalize(z, dim=1)
    return Leg(end, scale, functional.normalize(z + 0.3 * noise(num, dim, seed + 1), dim=1), z)


def test_an_even_bridge_that_carries_the_sum_passes_everything() -> None:
    found = examine("cosine", leg("a", 2.0, 0), leg("c", 2.0, 10))
    assert found.bridge_size == 2 * (1200 - 256)
    assert (found.sum.num_sources, found.sum.num_targets) == (64, 256)
    assert found.sphere is not None
    assert found.sphere.verdict == found.sum.sample_size_verdict == found.sum.agreement_verdict == "passes"
    assert found.sum.rank_correlation is not None
    assert found.sum.rank_correlation > 0.98  # Lemma 2: the order is that of the cosine
    assert (found.first.verdict, found.second.verdict) == ("passes", "passes")
    assert (found.first.end, found.first.scale, found.second.end) == ("a", 2.0, "c")
    assert found.method == "marginal"
    assert "same order" in found.reason


def test_a_sharp_critic_over_an_even_bridge_is_compared_directly_and_over_a_concentrated_one_summed() -> None:
    sharp = examine("cosine", leg("a", 60.0, 0, dim=24), leg("c", 60.0, 10, dim=24))
    assert sharp.sum.sample_size_verdict == "fails"
    assert sharp.method == "direct"
    dense = examine("cosine", leg("a", 60.0, 0, dim=24, towards=4.0), leg("c", 60.0, 10, dim=24, towards=4.0))
    assert dense.sphere is not None
    assert dense.sphere.verdict == "fails"
    if dense.sum.sample_size_verdict == "fails":
        assert "concentrated" in dense.reason
    assert dense.method == "marginal"


def test_inner_products_are_always_summed_and_both_shapes_are_told() -> None:
    found = examine("dot", leg("a", 1.0, 0), leg("c", 1.0, 10))
    assert found.method == "marginal"
    assert found.sphere is not None
    assert found.normal is not None
    alike = Leg("a", 1.0, torch.ones(40, 3), torch.ones(40, 3))
    assert examine("dot", alike, alike).normal is None


def test_offsets_are_even_for_true_ratios_and_show_a_row_that_is_shifted() -> None:
    ratio = torch.tensor([[1.5, 0.5], [0.5, 1.5]]).log()
    assert offset_deviation(ratio) == pytest.approx(0, abs=1e-7)
    assert offset_deviation(ratio + torch.tensor([[0.0], [2.0]])) == pytest.approx(math.sqrt(2))
    assert [judge_offsets(each) for each in (0.1, 0.7, 2.0)] == ["passes", "doubtful", "fails"]
    assert [judge_agreement(each) for each in (0.97, 0.9, 0.2, None)] == ["passes", "doubtful", "fails", "fails"]


def test_the_smallest_bank_can_be_looked_at() -> None:
    found = examine("squared_distance", leg("a", 1.0, 0, num=16), leg("c", 1.0, 10, num=16))
    assert found.bridge_size == 24
    assert found.sphere is None
    assert found.normal is not None


def test_of_large_banks_fewer_items_are_held_against_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of them for figures that mean something, and no larger matrix."""
    largest: list[int] = []
    summed = examination.marginal
    monkeypatch.setattr(examination, "SCORES", 1 << 12)
    monkeypatch.setattr(
        examination,
        "marginal",
        lambda f, g, **how: largest.append(max(f.numel(), g.numel())) or summed(f, g, **how),
    )
    found = examine("cosine", leg("a", 2.0, 0), leg("c", 2.0, 10))
    assert (found.sum.num_sources, found.sum.num_targets, found.bridge_size) == (4, 32, 2336)
    assert max(largest) == 8 * 2336
    assert found.sum.rank_correlation == pytest.approx(1.0, abs=0.05)
