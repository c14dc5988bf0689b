from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from worker.jobs import evaluate_retrieval
from worker.jobs.evaluate_retrieval import Summed


def unit(rows: int, seed: int) -> Tensor:
    return functional.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)), dim=1)


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    return values.logsumexp(dim) - torch.tensor(float(values.shape[dim])).double().log()


@pytest.mark.parametrize("scores_at_once", [1, 200, 1 << 22])
def test_a_sum_over_the_bridge_takes_the_scale_of_each_leg_however_it_is_cut(
    scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all terms at once in float64; neither a scale left out nor the two exchanged would pass."""
    monkeypatch.setattr(evaluate_retrieval, "SCORES_AT_ONCE", scores_at_once)
    source, bridge, target = unit(7, 0), unit(50, 1), unit(9, 2)
    f, g = 12.0 * source.double() @ bridge.double().T, 3.0 * bridge.double() @ target.double().T
    terms = f[:, :, None] + g[None]
    expected = log_mean_exp(terms, 1) - log_mean_exp(f, 1)[:, None] - log_mean_exp(g, 0)
    weights = (terms - terms.amax(1, keepdim=True)).exp()
    sizes = (weights.sum(1) ** 2 / weights.square().sum(1)).median(1).values

    summed = Summed("cosine", (12.0, 3.0), bridge, source, target, check=lambda: None)
    found = torch.cat([summed(slice(0, 4)), summed(slice(4, 7))])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert summed.effective_sample_size == pytest.approx(float(sizes.median()), rel=1e-4)
    assert summed.trusted_fraction == pytest.approx(float((sizes >= 10).double().mean()))
