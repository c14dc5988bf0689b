from __future__ import annotations

import pytest

from worker.theory import bridges, concentration
from worker.theory.findings import Setting, verdict_of


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concentration, "LENGTHS", (0.0, 0.1, 0.317))
    monkeypatch.setattr(concentration, "TRUTH", 40_000)
    monkeypatch.setattr(bridges, "SEARCHED", 10_000)


def test_the_claim_holds_on_seeds_of_its_own() -> None:
    outcome = concentration.run(Setting((20, 21, 22), False, lambda: None, lambda: None))
    assert verdict_of(outcome.findings) == "holds", [each for each in outcome.findings if each.verdict == "fails"]
    direct = [each.mean for each in outcome.findings if "direct, Spearman" in each.name]
    assert len(direct) == 3
    curve = next(each for each in outcome.curves if each.name == "spearman").series["direct"]
    assert all(row == sorted(row, reverse=True) for row in curve), "the more concentrated, the worse"


def test_a_bridge_that_is_even_where_it_should_not_be_misses_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bridges.clusters
    monkeypatch.setattr(bridges, "clusters", lambda seed, dim, _: made(seed, dim, 0.0))
    outcome = concentration.run(Setting((20,), False, lambda: None, lambda: None))
    missed = [each.name for each in outcome.findings if each.verdict == "fails"]
    assert "mean length 0.317: direct, Spearman with the truth" in missed
