from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from worker.evaluation import certificate
from worker.learning import retrieval

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TIED = st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1.0 + 2**-52, 1e308, -1e308])


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    num_items, num_labels = draw(st.integers(1, 6)), draw(st.integers(2, 9))
    values = draw(st.sampled_from([FINITE, TIED, st.floats(-30, 30)]))
    rows = draw(
        st.lists(st.lists(values, min_size=num_labels, max_size=num_labels), min_size=num_items, max_size=num_items)
    )
    truth = draw(st.lists(st.integers(0, num_labels - 1), min_size=num_items, max_size=num_items))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    scores = torch.tensor(rows, dtype=torch.float64)
    if dtype == torch.float32:
        scores = scores.clamp(-3e38, 3e38)
    return scores.to(dtype), torch.tensor(truth)


@given(scored())
def test_no_scores_break_the_bound(drawn: tuple[Tensor, Tensor]) -> None:
    scores, truth = drawn
    num_labels = scores.shape[1]
    relevant = torch.arange(num_labels) == truth[:, None]
    misses = {r: 1 - retrieval.hits_at_k(scores, relevant, r)[0] for r in range(1, num_labels)}
    cost = certificate.log_sum_exp(scores, truth)
    assert (cost >= 0).all()
    for found in certificate.certify(cost, misses):
        assert math.isfinite(found.bound.value)
        assert found.error.value <= found.bound.value
        assert found.error.value <= found.shown <= 1
        assert (misses[found.r] <= cost / math.log1p(found.r) * certificate.ROUNDED_UP).all()  # each sample for itself


def test_equal_scores_are_bounded_by_what_chance_misses() -> None:
    scores, truth = torch.zeros(5, 4), torch.arange(5) % 4
    relevant = torch.arange(4) == truth[:, None]
    misses = {r: 1 - retrieval.hits_at_k(scores, relevant, r)[0] for r in (1, 3)}
    first, third = certificate.certify(certificate.log_sum_exp(scores, truth), misses)
    assert (first.error.value, first.bound.value) == pytest.approx((3 / 4, math.log(4) / math.log(2)))
    assert first.shown == 1
    assert (third.error.value, third.bound.value) == pytest.approx((1 / 4, 1.0))


def test_a_label_just_below_r_others_reaches_the_bound() -> None:
    scores = torch.tensor([[0.0, 1e-13, 1e-13]], dtype=torch.float64)
    truth = torch.tensor([0])
    relevant = torch.arange(3) == truth[:, None]
    (found,) = certificate.certify(
        certificate.log_sum_exp(scores, truth), {2: 1 - retrieval.hits_at_k(scores, relevant, 2)[0]}
    )
    assert found.error.value == 1
    assert found.bound.value == pytest.approx(1, abs=1e-8)
