"""Answers for every critic against the formulas, term by term in float64."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from service.contract.losses import Critic
from worker.composition.chains import Bridge, Chain
from worker.composition.closed_forms import fit_normal
from worker.composition.streaming import Link
from worker.serving import known as known_module
from worker.serving import sizes, ways
from worker.serving.batcher import Batcher, Ticket
from worker.serving.compose import Composer
from worker.serving.known import Known, Memory
from worker.serving.ways import Closed, Compared, Health, Summed, Trained, Way

CPU = torch.device("cpu")
CRITICS: tuple[Critic, ...] = get_args(Critic)


def vectors(num: int, seed: int, length: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(num, 5)) * length).astype(np.float32)


def ready(critic: Critic, z: np.ndarray) -> np.ndarray:
    wide = z.astype(float)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True) if critic == "cosine" else wide


def scores(critic: Critic, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if critic == "squared_distance":
        return -((a[:, None] - b[None]) ** 2).sum(2) / 2
    return a @ b.T


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    return np.log(np.exp(values).mean(axis=axis, keepdims=True))


def ask(way: Way, source: np.ndarray, target: np.ndarray) -> tuple[dict[str, np.ndarray], list[str]]:
    composer = Composer(way, source, target, log_prior=None, top_k=len(target), device=CPU)
    document, arrays = composer.answer_at_once()
    order = arrays["index"].argsort(axis=1)
    return {name: np.take_along_axis(arrays[name], order, axis=1) for name in ("score", "log_ratio")}, document[
        "warnings"
    ]


@pytest.mark.parametrize("critic", CRITICS)
def test_an_untrained_pair_is_compared_as_the_trained_ones_are(critic: Critic) -> None:
    source, target = vectors(3, 0, 2.0), vectors(4, 1, 0.5)
    found, warnings = ask(Compared(critic, is_trained=False, bridge=None), source, target)
    np.testing.assert_allclose(
        found["score"], scores(critic, ready(critic, source), ready(critic, target)), rtol=1e-4, atol=1e-5
    )
    assert np.isnan(found["log_ratio"]).all()
    assert ("use marginal" in " ".join(warnings)) == (critic == "dot")


@pytest.mark.parametrize("critic", CRITICS)
def test_a_trained_pair_is_scaled_and_its_offset_is_the_banks_whatever_the_bias(critic: Critic) -> None:
    source, target, bank = vectors(3, 0), vectors(4, 1), vectors(50, 2)
    z, bridge = [ready(critic, each) for each in (source, target)], ready(critic, bank)
    f = 1.5 * scores(critic, z[0], z[1])
    for bias in (0.0, -7.0):
        found, _ = ask(Trained(critic, 1.5, bias, torch.from_numpy(bridge).float()), source, target)
        expected = f - log_mean_exp(1.5 * scores(critic, z[0], bridge), axis=1)
        np.testing.assert_allclose(found["log_ratio"], expected, rtol=1e-4, atol=1e-5)
        bare, _ = ask(Trained(critic, 1.5, bias, None), source, target)
        np.testing.assert_allclose(bare["log_ratio"], f + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", CRITICS)
@pytest.mark.parametrize("second", CRITICS)
def test_each_leg_of_a_sum_has_its_own_critic(first: Critic, second: Critic) -> None:
    source, target = vectors(3, 0), vectors(4, 1)
    bridges = ready(first, vectors(60, 2)), ready(second, vectors(60, 3))
    bridge = Bridge(torch.from_numpy(bridges[0]).float(), torch.from_numpy(bridges[1]).float())
    chain = Chain((Link(first, 1.5), Link(second, 0.7)), (bridge,))
    way = Summed(chain, comparable=first == second)
    found, _ = ask(way, source, target)
    f = 1.5 * scores(first, ready(first, source), bridges[0])
    g = 0.7 * scores(second, bridges[1], ready(second, target))
    expected = log_mean_exp(f[:, :, None] + g[None], axis=1)[:, 0] - log_mean_exp(f, axis=1) - log_mean_exp(g, axis=0)
    np.testing.assert_allclose(found["log_ratio"], expected, rtol=1e-4, atol=1e-5)


def test_a_pair_trained_by_regression_ranks_and_gives_no_ratio() -> None:
    way = Compared("squared_distance", is_trained=True, bridge=None)
    found, warnings = ask(way, vectors(2, 0), vectors(3, 1))
    assert np.isnan(found["log_ratio"]).all()
    assert "regression" in warnings[0]


def unit(rows: int, dim: int, seed: int, towards: float = 0.0) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(rows, dim))
    z[:, 0] += towards
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def summed(num: int = 300, *, scale: float = 6.0, towards: float = 0.0, dim: int = 6, is_open: bool = False) -> Summed:
    bridge = torch.from_numpy(unit(num, dim, 9, towards))
    chain = Chain((Link("cosine", scale), Link("cosine", scale)), (Bridge(bridge, bridge),))
    return Summed(chain, comparable=True, is_open=is_open)


def composer(way: Way, *, sources: int = 5, targets: int = 40, top_k: int = 7, dim: int = 6, **more: Any) -> Composer:
    more = {"log_prior": None, "device": CPU} | more
    return Composer(way, unit(sources, dim, 0), unit(targets, dim, 1), top_k=top_k, **more)


def chained() -> Summed:
    bridges = [torch.from_numpy(unit(num, 6, num)) for num in (50, 60)]
    chain = Chain((Link("cosine", 3.0),) * 3, tuple(Bridge(bridge, bridge) for bridge in bridges))
    return Summed(chain, comparable=True)


@pytest.mark.parametrize("way", [summed(), chained()], ids=["one bridge", "two"])
@pytest.mark.parametrize("prior", [None, np.log(np.arange(1, 41) / 820)])
def test_small_steps_answer_what_one_large_one_does(
    way: Summed, prior: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is cut: sources, targets, the bridge items of a chain, and what is looked at closely."""
    document, arrays = composer(way, log_prior=prior).answer_at_once()
    for name, value in {"ALL": 0, "PROBE": 3, "BLOCK_VALUES": 1 << 8, "STEP_PRODUCTS": 1 << 11}.items():
        monkeypatch.setattr(sizes, name, value)
    small = composer(way, log_prior=prior)
    steps = small.entries()
    assert len(steps) > 20
    for step in steps:
        small.run([step.item])
    again, found = small.answer()
    np.testing.assert_array_equal(found["index"], arrays["index"])
    for name in ("score", "log_ratio", "standard_error", "bias", "log_normaliser"):
        np.testing.assert_allclose(found[name], arrays[name], atol=1e-4, rtol=1e-3)
    assert again["bridge_size"] == document["bridge_size"]
    assert again["effective_sample_size"] == pytest.approx(document["effective_sample_size"], rel=0.5)


@pytest.mark.parametrize("targets", [40, 700])
@pytest.mark.parametrize("scale", [6.0, 400.0])
@pytest.mark.parametrize("prior", [False, True])
def test_a_set_that_is_asked_about_again_is_answered_from_what_was_kept(
    targets: int, scale: float, prior: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a scale whose sums float32 cannot hold the answer is the same, without what was kept."""
    log_prior = np.log(np.arange(1, targets + 1) / (targets * (targets + 1) / 2)) if prior else None
    plain, expected = composer(summed(scale=scale), top_k=3, targets=targets, log_prior=log_prior).answer_at_once()
    known = Known(Memory(), "a path", "embeddings/one/1")
    monkeypatch.setattr(sizes, "STEP_PRODUCTS", 1 << 14)
    num_steps: list[int] = []
    for _ in range(2):
        question = composer(summed(scale=scale), top_k=3, targets=targets, log_prior=log_prior, known=known)
        num_steps.append(len(question.entries()))
        for step in question.entries():
            question.run([step.item])
        document, found = question.answer()
        assert known.columns is not None
        np.testing.assert_array_equal(found["index"], expected["index"])
        for name in ("score", "log_ratio", "standard_error", "bias", "log_normaliser"):
            np.testing.assert_allclose(found[name], expected[name], atol=1e-3, rtol=1e-3)
        assert (document["method"], document["reason"]) == (plain["method"], plain["reason"])
        for name in ("effective_sample_size", "direct_marginal_spearman", "bridge_resultant"):
            assert document[name] == pytest.approx(plain[name], rel=1e-3)
        assert document["warnings"] == plain["warnings"]
    assert num_steps[1] < num_steps[0]


def test_nothing_is_kept_of_targets_that_came_with_the_call_or_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory()
    expected = composer(summed(), top_k=3).answer_at_once()[1]["index"]
    np.testing.assert_array_equal(
        composer(summed(), top_k=3, known=Known(memory, "a path", None)).answer_at_once()[1]["index"], expected
    )
    monkeypatch.setattr(known_module, "LARGEST_COLUMNS", 300 * 40 - 1)
    known = Known(memory, "a path", "embeddings/one/1")
    np.testing.assert_array_equal(composer(summed(), top_k=3, known=known).answer_at_once()[1]["index"], expected)
    assert memory.columns.num_bytes == 0
    assert known.health is not None


def test_short_steps_take_one_thread_and_leave_the_others_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []

    def look(way: Way) -> Health:
        seen.append(torch.get_num_threads())
        return Health()

    monkeypatch.setattr(ways, "look_at", look)
    try:
        composer(summed()).answer_at_once()
        monkeypatch.setattr(sizes, "SHORT", 0)
        composer(summed()).answer_at_once()
        assert (seen, torch.get_num_threads()) == ([1, 2], 2)
    finally:
        torch.set_num_threads(before)


def test_the_steps_of_a_question_go_through_the_batcher_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ALL": 0, "PROBE": 3, "STEP_PRODUCTS": 1 << 12}.items():
        monkeypatch.setattr(sizes, name, value)
    question = composer(summed())
    expected = composer(summed()).answer_at_once()[1]
    batcher = Batcher(max_tokens=2, max_waiting=1000)
    batcher.start()
    ticket = Ticket("compose", "compose", question.run, list(question.entries()), time.monotonic() + 30)
    asyncio.run(batcher.submit(ticket))
    batcher.stop()
    assert batcher.stats.batches > 3
    np.testing.assert_array_equal(question.answer()[1]["index"], expected["index"])


def test_steps_that_are_asked_for_twice_are_done_once_and_one_that_failed_stays_so() -> None:
    question = composer(summed())
    question.run([0])
    question.run([0, *range(1, len(question.entries()))])
    question.run(range(len(question.entries())))
    assert question.answer()[1]["index"].shape == (5, 7)

    def fail(_: Chain) -> None:
        raise RuntimeError("the cable is loose")

    broken = composer(chained(), keep=fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="loose"):
            broken.answer_at_once()


@pytest.mark.parametrize(
    ("way", "prior", "method", "words"),
    [
        (summed(scale=60.0, is_open=True), False, "direct", "lies evenly"),
        (summed(scale=60.0), False, "marginal", None),
        (summed(scale=60.0, is_open=True), True, "marginal", "prior"),
        (summed(scale=0.5, is_open=True), False, "marginal", "carries the sum"),
        (summed(scale=60.0, towards=4.0, is_open=True), False, "marginal", "concentrated"),
        (replace(summed(scale=60.0, is_open=True), comparable=False), False, "marginal", "differently"),
    ],
)
def test_a_question_that_leaves_the_method_open_is_answered_by_the_health_of_the_sum(
    way: Summed, prior: bool, method: str, words: str | None
) -> None:
    document, arrays = composer(way, log_prior=np.full(40, -3.7) if prior else None).answer_at_once()
    assert document["method"] == method
    assert words is None or words in document["reason"]
    assert np.isnan(arrays["log_ratio"]).all() == (method == "direct")
    if method == "direct":
        np.testing.assert_array_equal(
            arrays["index"], np.argsort(-unit(5, 6, 0) @ unit(40, 6, 1).T, axis=1, kind="stable")[:, :7]
        )
        assert not document["value_trusted"]


def test_values_are_doubted_aloud() -> None:
    """Dimensions 16 and a scale that would need more items than anybody has: the order is all there is."""
    hard, _ = composer(summed(2000, scale=30.0, dim=16), dim=16).answer_at_once()
    assert not hard["value_trusted"]
    assert "trust the order, not the numbers" in hard["warnings"][0]
    assert "biased by about -0.20 nats" in ways.warnings(summed(), Health(trusted=True, bias=-0.2))[0]
    assert "for 3 sources" in ways.warnings(summed(), Health(trusted=True, num_doubtful=3))[0]
    assert "could not be balanced" in ways.warnings(chained(), Health(trusted=True, deviation=0.4))[0]
    healthy, _ = composer(summed(2000, scale=1.0)).answer_at_once()
    assert healthy["value_trusted"]
    assert healthy["warnings"] == []
    weights = torch.full((300,), 1e-6)
    weights[:20] = 1.0
    chain = summed(scale=0.5).chain
    uneven = replace(chain, bridges=(replace(chain.bridges[0], weights=weights),))
    document, _ = composer(Summed(uneven, comparable=True)).answer_at_once()
    assert "counts as 6.7% of its items" in document["warnings"][-1]


def test_a_closed_form_is_trusted_where_the_bridge_has_its_shape() -> None:
    def ask_for(bridge: torch.Tensor | None, critic: Critic) -> dict[str, Any]:
        held = None if bridge is None else Bridge(bridge, bridge)
        normal = fit_normal(bridge) if bridge is not None and critic == "squared_distance" else None
        return composer(Closed(critic, (3.0, 2.0), held, normal)).answer_at_once()[0]

    even, tilted = (torch.from_numpy(unit(3000, 6, 3, towards)) for towards in (0.0, 2.0))
    assert ask_for(even, "cosine")["value_trusted"]
    assert "marginal ranks better" in ask_for(tilted, "cosine")["warnings"][0]
    assert "nothing tells" in ask_for(None, "cosine")["warnings"][0]
    normal = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
    assert ask_for(normal, "squared_distance")["value_trusted"]
    assert "not normal" in ask_for(normal**3, "squared_distance")["warnings"][0]


def test_a_closed_form_is_held_against_the_sum_where_the_bridge_carries_it() -> None:
    """A bridge on one axis has no mean direction, and is as far from even as can be."""
    line = torch.zeros(2000, 6)
    line[::2, 0], line[1::2, 0] = 1.0, -1.0
    document, _ = composer(Closed("cosine", (3.0, 3.0), Bridge(line, line), None)).answer_at_once()
    assert document["bridge_resultant"] == pytest.approx(0, abs=1e-6)
    assert not document["value_trusted"]
    assert "sums over the bridge differ from the closed form" in document["warnings"][0]
    few = torch.from_numpy(unit(3, 6, 3))  # which carry nothing: the shape alone is judged
    way = Closed("cosine", (30.0, 30.0), Bridge(few, few), None)
    assert ways.apart_from_sum(way, torch.from_numpy(unit(5, 6, 0)), torch.from_numpy(unit(40, 6, 1))) is None
    even = torch.from_numpy(unit(3000, 6, 3))
    weighed = Bridge(even, even, torch.rand(3000, generator=torch.Generator().manual_seed(0)))
    document, _ = composer(Closed("cosine", (3.0, 2.0), weighed, None)).answer_at_once()
    assert document["value_trusted"]


@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_one_target_one_bridge_item_and_more_asked_for_than_there_are(top_k: int) -> None:
    document, arrays = composer(summed(1), targets=1, top_k=top_k).answer_at_once()
    np.testing.assert_array_equal(arrays["index"], np.zeros((5, 1)))
    np.testing.assert_allclose(arrays["log_ratio"], 0, atol=1e-5)  # with one item nothing is known
    assert document["effective_sample_size"] == [1.0] * 5
    assert not document["value_trusted"]


def test_equal_targets_come_in_their_order() -> None:
    z = np.repeat(unit(1, 6, 1), 30, axis=0)
    question = Composer(summed(), unit(2, 6, 0), z, log_prior=None, top_k=30, device=CPU)
    np.testing.assert_allclose(question.answer_at_once()[1]["log_ratio"].std(axis=1), 0, atol=1e-5)
