from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from worker.composition import closed_forms as composition
from worker.theory import bridges, closed_forms
from worker.theory.findings import Setting, verdict_of

SETTING = Setting((11,), False, lambda: None, lambda: None)


def test_targets_are_at_the_inner_products_that_are_asked_for() -> None:
    a, c, cosines = closed_forms._around(7, np.random.default_rng(0))
    assert torch.allclose(a @ c.T, cosines)
    assert torch.allclose(c.norm(dim=1), torch.ones(len(c)).double())


def test_the_error_of_a_draw_is_what_many_draws_differ_by() -> None:
    rng = np.random.default_rng(0)
    a, c, _ = closed_forms._around(3, rng)
    exact = composition.sphere(a, c, (1.0, 2.0), normalise=False)
    b = bridges.even(2000 * 500, 3, rng)
    drawn = (b @ a.T + 2 * b @ c.T).reshape(2000, 500, -1).logsumexp(1) - math.log(500)
    found = closed_forms.error_of_draw(a, c, (1.0, 2.0), 500)
    assert float((drawn - exact).square().mean().sqrt()) == pytest.approx(found, rel=0.05)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_forms, "SAMPLES", (1_000, 10_000))
    monkeypatch.setattr(closed_forms, "SPHERES", {"d = 6, s = 1": closed_forms.SPHERES["d = 6, s = 1"]})


@pytest.mark.usefixtures("few")
def test_the_claim_holds_on_a_seed_of_its_own() -> None:
    outcome = closed_forms.run(SETTING)
    assert verdict_of(outcome.findings) == "holds", [each for each in outcome.findings if each.verdict == "fails"]


@pytest.mark.usefixtures("few")
def test_closed_forms_that_are_off_miss_their_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    right = composition.sphere

    def off(a: torch.Tensor, c: torch.Tensor, scales: tuple[float, float], *, normalise: bool) -> torch.Tensor:
        return right(a, c, scales, normalise=normalise) + 0.03

    monkeypatch.setattr(composition, "sphere", off)
    monkeypatch.setattr(composition, "gaussian", lambda *_, normalise: torch.zeros(1, 41).double())
    missed = {each.name for each in closed_forms.run(SETTING).findings if each.verdict == "fails"}
    assert missed == {
        "sphere, d = 6, s = 1: rms difference at 10,000 draws",
        "sphere, d = 6, s = 1: that over the error of 10,000 draws",
        *(f"normal bridge, variance {each:g}: largest difference" for each in closed_forms.NORMAL_VARIANCES),
    }
