"""Answers for every critic against the formulas, term by term in float64."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from service.contract.losses import Critic
from worker.composition.chains import Bridge, Chain
from worker.composition.streaming import Link
from worker.serving.compose import Composer
from worker.serving.ways import Compared, Summed, Trained, Way

CPU = torch.device("cpu")
CRITICS: tuple[Critic, ...] = get_args(Critic)


def vectors(num: int, seed: int, length: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(num, 5)) * length).astype(np.float32)


def ready(critic: Critic, z: np.ndarray) -> np.ndarray:
    wide = z.astype(float)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True) if critic == "cosine" else wide


def scores(critic: Critic, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if critic == "squared_distance":
        return -((a[:, None] - b[None]) ** 2).sum(2) / 2
    return a @ b.T


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    return np.log(np.exp(values).mean(axis=axis, keepdims=True))


def ask(way: Way, source: np.ndarray, target: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
    composer = Composer(way, source, target, log_prior=None, top_k=len(target), device=CPU)
    document, arrays = composer.answer_at_once()
    order = arrays["index"].argsort(axis=1)
    return {name: np.take_along_axis(arrays[name], order, axis=1) for name in ("score", "log_ratio")}, document[
        "warnings"
    ]


@pytest.mark.parametrize("critic", CRITICS)
def test_an_untrained_pair_is_compared_as_the_trained_ones_are(critic: Critic) -> None:
    source, target = vectors(3, 0, 2.0), vectors(4, 1, 0.5)
    found, warnings = ask(Compared(critic, is_trained=False, bridge=None), source, target)
    np.testing.assert_allclose(
        found["score"], scores(critic, ready(critic, source), ready(critic, target)), rtol=1e-4, atol=1e-5
    )
    assert np.isnan(found["log_ratio"]).all()
    assert ("use marginal" in " ".join(warnings)) == (critic == "dot")


@pytest.mark.parametrize("critic", CRITICS)
def test_a_trained_pair_is_scaled_and_its_offset_is_the_banks_whatever_the_bias(critic: Critic) -> None:
    source, target, bank = vectors(3, 0), vectors(4, 1), vectors(50, 2)
    z, bridge = [ready(critic, each) for each in (source, target)], ready(critic, bank)
    f = 1.5 * scores(critic, z[0], z[1])
    for bias in (0.0, -7.0):
        found, _ = ask(Trained(critic, 1.5, bias, torch.from_numpy(bridge).float()), source, target)
        expected = f - log_mean_exp(1.5 * scores(critic, z[0], bridge), axis=1)
        np.testing.assert_allclose(found["log_ratio"], expected, rtol=1e-4, atol=1e-5)
        bare, _ = ask(Trained(critic, 1.5, bias, None), source, target)
        np.testing.assert_allclose(bare["log_ratio"], f + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", CRITICS)
@pytest.mark.parametrize("second", CRITICS)
def test_each_leg_of_a_sum_has_its_own_critic(first: Critic, second: Critic) -> None:
    source, target = vectors(3, 0), vectors(4, 1)
    bridges = ready(first, vectors(60, 2)), ready(second, vectors(60, 3))
    bridge = Bridge(torch.from_numpy(bridges[0]).float(), torch.from_numpy(bridges[1]).float())
    chain = Chain((Link(first, 1.5), Link(second, 0.7)), (bridge,))
    way = Summed(chain, comparable=first == second)
    found, _ = ask(way, source, target)
    f = 1.5 * scores(first, ready(first, source), bridges[0])
    g = 0.7 * scores(second, bridges[1], ready(second, target))
    expected = log_mean_exp(f[:, :, None] + g[None], axis=1)[:, 0] - log_mean_exp(f, axis=1) - log_mean_exp(g, axis=0)
    np.testing.assert_allclose(found["log_ratio"], expected, rtol=1e-4, atol=1e-5)


def test_a_pair_trained_by_regression_ranks_and_gives_no_ratio() -> None:
    way = Compared("squared_distance", is_trained=True, bridge=None)
    found, warnings = ask(way, vectors(2, 0), vectors(3, 1))
    assert np.isnan(found["log_ratio"]).all()
    assert "regression" in warnings[0]
