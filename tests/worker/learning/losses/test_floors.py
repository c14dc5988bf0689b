from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.losses import InfoNCE, KSample, Loss, Sigmoid, Square
from worker.learning import losses
from worker.learning.losses import floor, floors


@pytest.mark.parametrize(("batch", "classes", "both_directions"), [(64, 20, 2.649985), (32, 10, 2.633774)])
def test_the_floor_of_info_nce_is_the_published_one(batch: int, classes: int, both_directions: float) -> None:
    """The published figures add the two directions; our loss is their mean."""
    least = floor(InfoNCE(), batch, np.full(classes, 100))
    assert least is not None
    assert 2 * least == pytest.approx(both_directions, abs=1e-5)


def test_the_floor_of_the_k_sample_risk_is_the_published_one() -> None:
    """The Bayes risk of four candidates and ten classes that are read off perfectly."""
    assert floor(KSample(candidates=4), 640, np.full(10, 7)) == pytest.approx(0.398967, abs=1e-6)


def test_the_floor_is_nothing_without_repeats_and_log_batch_with_nothing_else() -> None:
    once = np.ones(100_000, int)
    for loss in (InfoNCE(), KSample(), Sigmoid()):
        least = floor(loss, 20, once)
        assert least is not None
        assert 0 <= least < 5e-3
    assert floor(InfoNCE(), 16, np.array([50])) == pytest.approx(math.log(16))
    assert floor(KSample(candidates=5), 60, np.array([50])) == pytest.approx(2 * math.log(5))
    # One class: every pair looks alike, and yes is right once in 16
    yes = 1 / 16
    entropy = -yes * math.log(yes) - (1 - yes) * math.log(1 - yes)
    assert floor(Sigmoid(), 16, np.array([50])) == pytest.approx(16 * entropy)


def perfect(loss: Loss, classes: torch.Tensor, shares: np.ndarray) -> float:
    """Compute the loss of a batch whose vectors tell the classes apart and nothing more."""
    if not isinstance(loss, Sigmoid):
        z = torch.eye(len(shares)).double()[classes]
        return float(losses.compute(loss, z, z, torch.tensor(200.0).double()))
    # The best logit of a class, and a no that is certain between classes
    best = -np.log((len(classes) - 1) * shares)
    z_a = torch.eye(len(shares)).double()[classes]
    table = torch.full((len(shares), len(shares)), -500.0).double()
    table[range(len(shares)), range(len(shares))] = torch.from_numpy(best)
    zero = torch.tensor(0.0).double()
    return float(losses.compute(loss, z_a, table[classes], torch.tensor(1.0).double(), zero))


@pytest.mark.parametrize("loss", [InfoNCE(critic="dot"), KSample(critic="dot", candidates=3), Sigmoid(critic="dot")])
def test_perfect_vectors_of_drawn_classes_reach_the_floor(loss: Loss) -> None:
    rng = np.random.default_rng(0)
    counts = np.array([1, 2, 3, 6, 8])
    shares = counts / counts.sum()
    drawn = [perfect(loss, torch.from_numpy(rng.choice(5, 16, p=shares)), shares) for _ in range(3000)]
    least = floor(loss, 16, counts)
    assert least is not None
    assert abs(np.mean(drawn) - least) < 4 * np.std(drawn) / math.sqrt(len(drawn))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(2, 40),
    st.lists(st.floats(-8, 8), min_size=12, max_size=12),
)
def test_no_logits_are_below_the_floor_of_the_sigmoid_loss(sizes: list[int], batch: int, logits: list[float]) -> None:
    counts = np.array(sizes)
    share = counts / counts.sum()
    chosen = np.array(logits[: len(sizes)])
    cost = share @ (np.logaddexp(0, -chosen) + (batch - 1) * share * np.logaddexp(0, chosen))
    assert cost >= floors.sigmoid(batch - 1, counts) - 1e-9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.integers(2, 40))
def test_more_repeats_and_more_company_never_lower_a_floor(sizes: list[int], batch: int) -> None:
    merged = [sizes[0] + sizes[1], *sizes[2:]]
    for of in (floors.softmax, floors.sigmoid):
        least = of(batch - 1, np.array(sizes))
        assert of(batch - 1, np.array(merged)) >= least - 1e-9
        assert of(batch, np.array(sizes)) >= least - 1e-9


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"critic": "cosine"}, -0.5), ({"critic": "squared_distance"}, 0.0), ({"critic": "dot"}, None)],
)
def test_pulling_positives_lowers_the_floor_by_the_best_that_it_can_reach(
    changes: dict[str, Any], expected: float | None
) -> None:
    counts = np.full(10, 3)
    plain, pulled = (floor(InfoNCE.model_validate(changes | {"attract": x}), 16, counts) for x in (0, 0.5))
    assert plain is not None
    assert pulled == (None if expected is None else plain + expected)


def test_the_square_loss_has_no_floor_that_is_known() -> None:
    assert floor(Square(), 16, np.full(10, 3)) is None
