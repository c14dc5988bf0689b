"""Dependence beside the bridge, on triples whose I(a; c | b) is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worker.composition import independence

BYPASSES = (0.0, 0.25, 0.5, 0.75)


def triples(seed: int, bypass: float, num: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the paper's: a = sqrt(1 - rho) M_a b + sqrt(rho) N_a u + noise, the same u in c (dims 16, 8, 16)."""
    rng = np.random.default_rng(seed)
    views = [(rng.uniform(-1, 1, (16, 8)), rng.uniform(-1, 1, (16, 8))) for _ in range(2)]
    b, u = (rng.normal(size=(num, 8)) @ rng.uniform(-1, 1, (8, 8)) for _ in range(2))
    ends = [
        math.sqrt(1 - bypass) * b @ of_b.T + math.sqrt(bypass) * u @ of_u.T + rng.normal(size=(num, 16))
        for of_b, of_u in views
    ]
    a, b, c = (torch.from_numpy(each) for each in (ends[0], b, ends[1]))
    return a, b, c


def nats(seed: int, bypass: float) -> float:
    return float(independence.measure(*triples(seed, bypass)).nats.mean())


def test_more_bypass_is_more_dependence_in_nine_seeds_of_ten() -> None:
    found = [[nats(seed, bypass) for bypass in BYPASSES] for seed in range(10)]
    assert sum(each == sorted(each) and len(set(each)) == len(each) for each in found) >= 9
    assert all(abs(each[0]) < 0.15 for each in found)
    assert all(each[1] > 0.5 for each in found)


def test_the_figure_approaches_the_information_from_below() -> None:
    rng = np.random.default_rng(0)
    b, u = rng.normal(size=(1024, 3)), rng.normal(size=(1024, 1))
    a, c = (b @ rng.normal(size=(3, 3)) + 2 * u + rng.normal(size=(1024, 3)) for _ in range(2))
    found = independence.measure(*(torch.from_numpy(each) for each in (a, b, c)))
    correlation = 3 * 4 / (3 * 4 + 1)  # of the mean of a's coordinates with that of c's, b taken off
    information = -math.log1p(-(correlation**2)) / 2
    assert float(found.nats.mean()) == pytest.approx(information, abs=0.15)
    assert found.correlations.tolist() == pytest.approx([correlation], abs=0.03)


def test_what_both_owe_to_the_bridge_is_no_dependence_even_where_it_is_no_line() -> None:
    generator = torch.Generator().manual_seed(0)
    b, e, g = (torch.randn(1024, 4, generator=generator) for _ in range(3))
    found = independence.measure(b.square() + 0.3 * e, b, b.sin() * b.cos() + 0.3 * g)
    assert abs(float(found.nats.mean())) < 0.15


def test_verdicts_and_limits() -> None:
    assert [independence.judge(nats, 0.01) for nats in (-0.2, 0.04, 0.3, 0.7)] == [
        "passes",
        "passes",
        "doubtful",
        "fails",
    ]
    assert independence.judge(0.3, 0.2) == "passes"
    with pytest.raises(ValueError, match="too few"):
        independence.measure(*(each[:20] for each in triples(0, 0.0)))


def test_ends_that_are_all_alike_tell_nothing() -> None:
    z = torch.ones(100, 3)
    assert float(independence.measure(z, torch.randn(100, 3), z).nats.mean()) == 0
