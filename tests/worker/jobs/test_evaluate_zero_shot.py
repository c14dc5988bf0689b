from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from worker.jobs.evaluate_zero_shot import log_posterior


def unit(rows: int, seed: int) -> torch.Tensor:
    return functional.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_it_is_log_prior_plus_log_mean_exp_of_the_scaled_scores() -> None:
    z, prompts = unit(3, 0), {"a": unit(4, 1), "b": unit(2, 2)}
    prior = {"a": 0.3, "b": 0.7}
    log_prior = torch.tensor([math.log(0.3), math.log(0.7)], dtype=torch.float64)
    f = 5 * z @ torch.cat(list(prompts.values())).T
    found = log_posterior(f, torch.tensor([0, 0, 0, 0, 1, 1]), log_prior)
    for at in range(3):
        weights = {
            label: prior[label] * sum(math.exp(5 * float(z[at] @ prompt)) for prompt in rows) / len(rows)
            for label, rows in prompts.items()
        }
        total = sum(weights.values())
        expected = [math.log(weight / total) for weight in weights.values()]
        assert found[at].tolist() == pytest.approx(expected, abs=1e-5)


def test_saying_a_prompt_twice_changes_nothing() -> None:
    z, flat = unit(3, 0), torch.zeros(2, dtype=torch.float64)
    a, b = 5 * z @ unit(4, 1).T, 5 * z @ unit(2, 2).T
    once = log_posterior(torch.cat([a, b], 1), torch.tensor([0] * 4 + [1] * 2), flat)
    twice = log_posterior(torch.cat([a, a, b], 1), torch.tensor([0] * 8 + [1] * 2), flat)
    torch.testing.assert_close(once, twice)


def test_a_bias_on_every_score_changes_nothing() -> None:
    f, owners = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 0, 1, 1, 1])
    flat = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(log_posterior(f - 10, owners, flat), log_posterior(f, owners, flat))
