"""What the experiments of the unpaired-modalities paper are made of, held to its golden values and definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worker.composition import closed_forms as composition
from worker.theory import assumption_a1, bridges, closed_forms, discrete_exact, estimator_honesty, experiments, gaussian
from worker.theory.findings import Setting, verdict_of

SETTING = Setting((0,), False, lambda: None, lambda: None)


@pytest.mark.parametrize(
    ("dim", "scale", "cosine", "value"),
    [
        (6, 1.0, 0.5, 0.242669),
        (6, 1.0, -0.5, 0.082484),
        (16, 5.0, 0.0, 1.449217),
        (64, 10.0, 0.3, 1.973231),
        (3, 1.0, 0.5, math.log(math.sinh(math.sqrt(3)) / math.sqrt(3))),
    ],
)
def test_lemma_2_has_its_golden_values(dim: int, scale: float, cosine: float, value: float) -> None:
    a, c = torch.zeros(1, dim), torch.zeros(1, dim)
    a[0, 0] = 1
    c[0, 0], c[0, 1] = cosine, math.sqrt(1 - cosine**2)
    found = composition.sphere(a, c, (scale, scale), normalise=False)
    assert float(found) == pytest.approx(value, abs=2e-6)


def test_lemma_3_has_its_golden_value() -> None:
    # |a - c|^2 = 1 and <a, c> = .2 in 3 dimensions, variance 1.5
    a = torch.tensor([[math.sqrt(0.7), 0.0, 0.0]], dtype=torch.float64)
    x = 0.2 / math.sqrt(0.7)
    c = torch.tensor([[x, math.sqrt(0.7 - x**2), 0.0]], dtype=torch.float64)
    bridge = composition.Normal(torch.zeros(3).double(), torch.eye(3).double(), torch.full((3,), 1.5).double())
    found = composition.gaussian(a, c, (1.0, 1.0), bridge, normalise=False)
    assert float(found) == pytest.approx(-2.441942, abs=1e-6)


def test_targets_are_at_the_inner_products_that_are_asked_for() -> None:
    a, c, cosines = closed_forms._around(7, np.random.default_rng(0))
    assert torch.allclose(a @ c.T, cosines)
    assert torch.allclose(c.norm(dim=1), torch.ones(len(c)).double())


def test_the_true_log_ratio_has_no_divergence_and_a_shift_does_not_matter() -> None:
    law = bridges.alphabets(0)
    truth = (law.c_given_a / law.of_c).log()
    found = discrete_exact.quality(law, truth + torch.arange(40.0).double()[:, None])
    assert found.divergence == pytest.approx(0, abs=1e-12)
    assert (found.top_1, found.rank_correlation) == (1.0, pytest.approx(1.0))
    nothing = discrete_exact.quality(law, torch.zeros(40, 40).double())
    kl = (law.c_given_a * (law.c_given_a / law.of_c).log()).sum(1).mean()
    assert nothing.divergence == pytest.approx(float(kl))
    assert nothing.rank_correlation == 0.0


def test_the_best_temperature_undoes_a_wrong_one() -> None:
    law = bridges.alphabets(0)
    truth = (law.c_given_a / law.of_c).log()
    assert discrete_exact.quality(law, 3 * truth).divergence > 0.1
    assert discrete_exact.best_divergence(law, 3 * truth) < 1e-3


def test_joined_pairs_take_the_nearest_b() -> None:
    def triples(b: list[float], c: list[float]) -> gaussian.Triples:
        column = [torch.tensor([each]).T.double() for each in (b, b, c)]
        return gaussian.Triples(*column)

    joined = assumption_a1.joined(triples([0.0, 5.0], [7.0, 7.0]), triples([4.0, 1.0, 90.0], [40.0, 10.0, 900.0]))
    assert joined.c.flatten().tolist() == [10.0, 40.0]
    assert joined.b.flatten().tolist() == [0.0, 5.0]


def test_rising_is_strict() -> None:
    assert assumption_a1.is_rising([0.0, 0.1, 2.0])
    assert not assumption_a1.is_rising([0.0, 0.0, 2.0])
    assert not assumption_a1.is_rising([0.0, 0.2, 0.1])


def test_honesty_is_measured_against_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator_honesty, "NUM_QUERIES", 30)
    easy = estimator_honesty.measure(estimator_honesty.Case("8/4/8", 4.0, 5_000, ""), 0, SETTING, normalise=False)
    assert easy.sample_size > 500
    assert easy.coverage > 0.8
    assert easy.rmse < 0.1
    assert easy.trusted == 1.0
    hard = estimator_honesty.measure(estimator_honesty.Case("32/16/32", 2.0, 200, ""), 0, SETTING, normalise=False)
    assert hard.sample_size < 2
    assert hard.coverage < 0.2
    assert hard.bias < -10
    assert hard.trusted == 0.0


def test_cheap_claims_hold_on_a_seed_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_forms, "SAMPLES", (10_000,))
    monkeypatch.setattr(closed_forms, "SPHERES", {"d = 6, s = 1": closed_forms.SPHERES["d = 6, s = 1"]})
    monkeypatch.setattr(assumption_a1, "NUM_TRIPLES", 320)
    monkeypatch.setattr(assumption_a1, "NUM_DIAGNOSED", 256)
    for name in ("closed-forms", "assumption-a1"):
        outcome = experiments.run(name, Setting((11,), False, lambda: None, lambda: None))
        assert verdict_of(outcome.findings) == "holds", [each for each in outcome.findings if each.verdict == "fails"]
