from __future__ import annotations

import pytest

from worker.theory import gaussian_table
from worker.theory.findings import Setting


def test_exact_ratios_come_nearer_to_bayes_with_more_of_the_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_table, "CRITICS", ())
    monkeypatch.setattr(gaussian_table, "POOLS", (200, 5_000))
    monkeypatch.setattr(gaussian_table, "EXACT", (0.79, 0.79))
    stepped: list[int] = []
    setting = Setting((3, 4, 5), False, lambda: stepped.append(1), lambda: None)
    by_name = {each.name: each for each in gaussian_table.run(setting).findings}
    assert by_name["Bayes"].verdict == "holds"
    few, many = (by_name[f"exact ratios, {num} b: recall, held to not less"] for num in ("200", "5,000"))
    assert (few.verdict, many.verdict) == ("fails", "holds")
    assert few.mean < many.mean < by_name["Bayes"].mean
    assert len(stepped) == 3


def test_all_learned_critics_are_measured_on_the_first_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_table, "NUM_PAIRS", 300)
    monkeypatch.setattr(gaussian_table, "NUM_TRIPLES", 64)
    monkeypatch.setattr(gaussian_table, "POOLS", (100, 200))
    monkeypatch.setattr(gaussian_table, "STEPS", 10)
    stepped: list[int] = []
    setting = Setting((0, 1, 2), False, lambda: stepped.append(1), lambda: None)
    outcome = gaussian_table.run(setting)
    assert len(stepped) == gaussian_table.num_runs(3)
    seeds = {each.name: len(each.per_seed) for each in outcome.findings}
    assert seeds["Bayes"] == 3
    assert seeds["squared_distance, separate: direct"] == gaussian_table.LEARNED_SEEDS
    missed = {each.name for each in outcome.findings if each.verdict == "fails"}
    assert "cosine, shared: sum over 200" in missed, "ten steps teach nothing"
