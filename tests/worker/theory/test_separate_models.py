from __future__ import annotations

import pytest
import torch

from worker.theory import composing, dropped_scale, gaussian, links, separate_models
from worker.theory.findings import Setting, verdict_of

SETTING = Setting((3,), False, lambda: None, lambda: None)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separate_models, "NUM_PAIRS", 4000)
    monkeypatch.setattr(separate_models, "NUM_TRIPLES", 320)
    monkeypatch.setattr(separate_models, "BRIDGE", 2000)
    monkeypatch.setattr(separate_models, "CRITICS", ("cosine",))
    monkeypatch.setattr(separate_models, "STEPS", 200)
    monkeypatch.setattr(dropped_scale, "STEPS", 200)


def test_the_claim_holds_for_small_models() -> None:
    outcome = separate_models.run(SETTING)
    by_name = {each.name: each for each in outcome.findings}
    assert by_name["cosine, separate: direct"].verdict == "holds"
    assert by_name["cosine, shared: direct over the oracle"].verdict == "holds"
    assert by_name["cosine, separate: sum over that of the oracle"].mean > 0.7
    assert by_name["cosine, shared: direct"].mean > 10 * by_name["cosine, separate: direct"].mean


def test_models_that_were_not_trained_miss_the_bar_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = separate_models.train

    def untrained(
        setting: Setting, data: separate_models.Data, kind: separate_models.Kind, plan: links.Plan, seed: int
    ) -> tuple[links.Trained, links.Trained]:
        return trained(setting, data, kind, links.Plan(plan.critic, 1, plan.dimensions, plan.hidden), seed)

    monkeypatch.setattr(separate_models, "train", untrained)
    outcome = separate_models.run(SETTING)
    missed = {each.name for each in outcome.findings if each.verdict == "fails"}
    assert missed == {"cosine, separate: sum over that of the oracle", "cosine, shared: direct over the oracle"}
    assert verdict_of(outcome.findings) == "fails"


def test_shared_is_one_model_and_separate_are_two() -> None:
    law = gaussian.views(0, (4, 2, 4), noise=0.5)
    data = separate_models.draw(law, 0, 50, 32, 20)
    plan = links.Plan("dot", 1, 4, 8)
    first, second = separate_models.train(SETTING, data, "shared", plan, 0)
    assert first is second
    assert set(first.modules) == {"a", "b", "c"}
    first, second = separate_models.train(SETTING, data, "separate", plan, 0)
    assert (set(first.modules), set(second.modules)) == ({"a", "b"}, {"b", "c"})
    assert not torch.allclose(first.embed("b", data.bridge), second.embed("b", data.bridge))
    assert set(separate_models.train_oracle(SETTING, data, plan, 0).modules) == {"a", "c"}


def test_everything_that_is_drawn_is_new() -> None:
    data = separate_models.draw(gaussian.views(0, (4, 2, 4), noise=0.5), 0, 50, 32, 20)
    b = torch.cat([data.first.b, data.second.b, data.tested.b, data.bridge])
    assert len(b.unique(dim=0)) == 50 + 50 + 32 + 20


def test_without_its_scale_a_sum_of_cosines_ranks_worse_and_that_is_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The claim's own bar needs longer training, whose scales are larger."""
    lost = [each.mean for each in dropped_scale.run(SETTING).findings if "minus recall without" in each.name]
    assert len(lost) == 2
    assert min(lost) > 0.1
    right = composing.learned

    def forgetful(
        first: links.Trained,
        second: links.Trained,
        triples: gaussian.Triples,
        bridge: torch.Tensor,
        *,
        scale: float | None = None,
    ) -> composing.Legs:
        del scale
        return right(first, second, triples, bridge, scale=1.0)

    monkeypatch.setattr(composing, "learned", forgetful)
    outcome = dropped_scale.run(SETTING)
    assert verdict_of(outcome.findings) == "fails"
    assert [each.mean for each in outcome.findings if "minus recall without" in each.name] == [0.0, 0.0]
