from __future__ import annotations

from dataclasses import replace

import pytest

from worker.composition import estimators
from worker.theory import estimator_honesty
from worker.theory.findings import Setting, verdict_of

SETTING = Setting((0,), False, lambda: None, lambda: None)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimator_honesty, "NUM_QUERIES", 30)


def test_honesty_is_measured_against_the_closed_form() -> None:
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


def test_error_bars_that_are_too_small_and_trust_that_is_not_earned_miss_their_bars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases = [estimator_honesty.CASES[0], replace(estimator_honesty.CASES[-1], num_bridge=1_000)]
    monkeypatch.setattr(estimator_honesty, "CASES", tuple(cases))
    assert verdict_of(estimator_honesty.run(SETTING).findings) == "holds"
    right = estimators.marginal

    def bold(*legs: object, normalise: bool) -> estimators.Marginal:
        found = right(*legs, normalise=normalise)  # pyright: ignore[reportArgumentType]
        return replace(found, standard_error=found.standard_error / 4, trusted=found.trusted | True)

    monkeypatch.setattr(estimators, "marginal", bold)
    missed = [each.name.split(": ")[1] for each in estimator_honesty.run(SETTING).findings if each.verdict == "fails"]
    assert missed == ["coverage", "coverage, normalised", "share of the sources whose values are trusted"]
