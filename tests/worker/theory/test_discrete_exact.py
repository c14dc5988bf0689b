from __future__ import annotations

import pytest
import torch

from worker.theory import bridges, discrete_exact
from worker.theory.findings import Setting, verdict_of

SETTING = Setting((3,), False, lambda: None, lambda: None)


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


def test_the_claim_holds_on_a_seed_of_its_own_and_not_of_untrained_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrete_exact, "LEARNERS", (("dot", 32),))
    monkeypatch.setattr(discrete_exact, "STEPS", 200)
    outcome = discrete_exact.run(SETTING)
    assert verdict_of(outcome.findings) == "holds", [each for each in outcome.findings if each.verdict == "fails"]
    by_samples = [each.mean for each in outcome.findings if each.name.startswith("exact") and "KL" in each.name]
    assert by_samples == sorted(by_samples, reverse=True)
    assert len(by_samples) == len(discrete_exact.SAMPLES)
    monkeypatch.setattr(discrete_exact, "STEPS", 1)
    missed = [each.name for each in discrete_exact.run(SETTING).findings if each.verdict == "fails"]
    assert "dot, 32 dimensions: sum: KL" in missed
    assert "Lemma 1: largest error over all a and c" not in missed
