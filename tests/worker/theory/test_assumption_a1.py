from __future__ import annotations

import pytest
import torch

from worker.theory import assumption_a1, gaussian
from worker.theory.findings import Setting, verdict_of

SETTING = Setting((11,), False, lambda: None, lambda: None)


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


def test_the_claim_holds_on_a_seed_of_its_own_and_not_for_a_diagnostic_of_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assumption_a1, "NUM_TRIPLES", 320)
    monkeypatch.setattr(assumption_a1, "NUM_DIAGNOSED", 256)
    outcome = assumption_a1.run(SETTING)
    assert verdict_of(outcome.findings) == "holds", [each for each in outcome.findings if each.verdict == "fails"]
    seen = assumption_a1.seen

    def of_pairs(triples: gaussian.Triples) -> float:
        half = len(triples.b) // 2
        first, second = (
            gaussian.Triples(*(each[rows] for each in (triples.a, triples.b, triples.c)))
            for rows in (slice(0, half), slice(half, None))
        )
        return seen(assumption_a1.joined(first, second))

    monkeypatch.setattr(assumption_a1, "seen", of_pairs)
    missed = [each.name for each in assumption_a1.run(SETTING).findings if each.verdict == "fails"]
    assert missed == ["the diagnostic ranks rho = 0, .25, .5, .75 right"]
