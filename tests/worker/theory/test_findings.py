from __future__ import annotations

import math

import pytest

from service.contract.experiments import Bar
from worker.theory.findings import Setting, at_least, at_most, finding, interval, meets, unasserted, verdict_of


def judged(values: list[float], bar: Bar | None) -> str:
    return finding("n", "d", "e", values, bar).verdict


@pytest.mark.parametrize(
    ("values", "bar", "verdict"),
    [
        ([0.02, 0.01], at_most(0.02), "holds"),
        ([0.02, math.nextafter(0.02, 1)], at_most(0.02), "fails"),
        ([0.3, 0.4], at_least(0.3), "holds"),
        ([math.nextafter(0.3, 0), 0.4], at_least(0.3), "fails"),
        ([0.0, 0.4], at_least(0.2, mean=True), "holds"),
        ([0.0, 0.4], at_least(0.2), "fails"),
        ([0.0, 0.4], at_most(0.2, mean=True), "holds"),
        ([0.0, 0.5], at_most(0.2, mean=True), "fails"),
        ([5.0], None, "reported"),
    ],
)
def test_a_bar_is_reached_exactly_or_not(values: list[float], bar: Bar | None, verdict: str) -> None:
    assert judged(values, bar) == verdict


@pytest.mark.parametrize("bar", [at_most(1.0), at_least(-1.0), at_most(1.0, mean=True), at_least(-1.0, mean=True)])
def test_what_is_no_number_reaches_no_bar(bar: Bar) -> None:
    assert not meets(bar, [0.0, math.nan])


def test_one_missed_bar_fails_a_claim_and_without_bars_it_is_reported() -> None:
    good, bad, plain = (finding("n", "d", "e", [1.0], each) for each in (at_most(1.0), at_most(0.5), None))
    assert verdict_of([good, plain]) == "holds"
    assert verdict_of([good, bad, plain]) == "fails"
    assert verdict_of([plain]) == verdict_of([]) == "reported"
    assert verdict_of(unasserted([good, bad])) == "reported"
    assert [each.bar for each in unasserted([good, bad])] == [good.bar, bad.bar]


def test_the_interval_is_students() -> None:
    assert interval([1.0]) is None
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    # mean 2, standard deviation 1, t(2) = 4.303
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-6)
    assert 2 - low == pytest.approx(high - 2)


def test_the_quantiles_go_on_smoothly_beyond_the_table() -> None:
    def half(num: int) -> float:
        values = [0.0, 1.0] * (num // 2)
        low, high = interval(values) or (0, 0)
        deviation = math.sqrt(num * 0.25 / (num - 1))
        return (high - low) / 2 / (deviation / math.sqrt(num))

    assert half(30) == pytest.approx(2.045)
    assert half(32) == pytest.approx(2.0395, abs=0.003)  # t(31)
    assert half(100) == pytest.approx(1.984, abs=0.003)  # t(99)


def test_a_quick_run_does_a_tenth_of_the_steps() -> None:
    setting = Setting((0,), True, lambda: None, lambda: None)
    assert (setting.steps(2000), setting.steps(40)) == (200, 10)
    assert Setting((0,), False, lambda: None, lambda: None).steps(40) == 40
