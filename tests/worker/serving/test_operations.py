"""Compositions over a real inference process: checked against the estimators, and against the formulas themselves."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.contract.artifacts import Store
from service.contract.errors import Invalid, IsthmusError, Malformed, Unavailable
from service.contract.wire import Arrays, ComposeAnswer, ModelRef, call_adapter
from worker.composition.chains import Bridge, Chain
from worker.composition.streaming import Link
from worker.learning.model import Loaded, load_model
from worker.learning.ragged import Ragged
from worker.serving.batcher import Batcher
from worker.serving.bridge import Bridges
from worker.serving.compose import Composer
from worker.serving.operations import Answer, Parts, answer
from worker.serving.residency import Residency
from worker.serving.sets import Sets
from worker.serving.ways import Summed, Trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def refs(models: Store, publish_model: Callable[..., ModelRef]) -> dict[str, ModelRef]:
    return {
        "one": publish_model(models, "models/one/1", seed=1),
        "two": publish_model(models, "models/two/1", seed=2),
        "vectors": publish_model(models, "models/vectors/1", seed=3, keep="vectors"),
        "none": publish_model(models, "models/none/1", seed=4, keep="none"),
    }


@pytest.fixture(scope="module")
def loaded(folder: Path, refs: dict[str, ModelRef]) -> dict[str, Loaded]:
    return {name: load_model(folder / "store" / ref.artifact, "cpu") for name, ref in refs.items()}


@pytest.fixture
def ask(models: Store, refs: dict[str, ModelRef]) -> Iterator[Callable[..., Answer]]:
    """Ask a question: legs are (model, from, to)."""
    with asyncio.Runner() as runner:
        batcher = Batcher(max_tokens=16_384, max_waiting=100_000)
        batcher.start()
        residency = Residency(models, device=CPU, max_bytes=1 << 30)
        parts = Parts(residency, batcher, Bridges(residency, batcher, device=CPU), Sets(models), CPU)

        def compose(
            *legs: tuple[str, str, str], method: str, arrays: Arrays, bank: bool = True, top_k: int = 100
        ) -> Answer:
            document = {
                "op": "compose",
                "legs": [{"model": refs[name].model_dump(), "from": origin, "to": end} for name, origin, end in legs],
                "method": method,
                "bank": bank,
                "log_prior": "log_prior" in arrays,
                "source_items": "source.values" in arrays,
                "top_k": top_k,
            }
            call = call_adapter.validate_python(document)
            return runner.run(answer(parts, call, arrays, deadline=time.monotonic() + 30))

        yield compose
        batcher.stop()


def unit(rng: np.random.Generator, num: int, dim: int = 8) -> np.ndarray:
    z = rng.normal(size=(num, dim))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def by_target(found: Answer, name: str) -> np.ndarray:
    """Undo the ranking: (source, target)."""
    return np.take_along_axis(found.arrays[name], found.arrays["index"].argsort(axis=1), axis=1)


def log_mean_exp(values: np.ndarray, axis: int) -> np.ndarray:
    largest = values.max(axis=axis, keepdims=True)
    return np.log(np.exp(values - largest).mean(axis=axis, keepdims=True)) + largest


SCALE = math.exp(1.5)


def expected_marginal(source: np.ndarray, target: np.ndarray, bridges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Lemma 1 of Che & Eysenbach (2025) in float64, term by term, the offset of each leg removed."""
    f, g = SCALE * source.astype(float) @ bridges[0].T.astype(float), SCALE * bridges[1].astype(float) @ target.T
    joint = log_mean_exp(f[:, :, None] + g[None], axis=1)[:, 0]
    return joint - log_mean_exp(f, axis=1) - log_mean_exp(g, axis=0)


def bank_of(loaded: Loaded, modality: str, *pairs: str) -> np.ndarray:
    return np.concatenate([loaded.banks[pair].vectors[modality].numpy() for pair in pairs])


def test_a_source_that_comes_as_tokens_is_embedded_on_the_way(ask: Any, loaded: dict[str, Loaded]) -> None:
    legs, rng = (("one", "code", "text"), ("one", "text", "state")), np.random.default_rng(0)
    target = unit(rng, 7)
    sequences = [[rng.integers(0, 50, length).astype(np.int32)] for length in (3, 5)]
    with torch.inference_mode():
        source = loaded["one"].model.encode("code", Ragged.from_sequences(sequences)).numpy()
    items = {
        "source.values": np.concatenate([item[0] for item in sequences]),
        "source.lengths": np.array([3, 5], np.int32),
        "source.owners": np.array([0, 1], np.int32),
    }
    found = ask(*legs, method="marginal", arrays=items | {"target": target})
    expected = ask(*legs, method="marginal", arrays={"source": source, "target": target})
    np.testing.assert_array_equal(found.arrays["index"], expected.arrays["index"])
    np.testing.assert_allclose(found.arrays["log_ratio"], expected.arrays["log_ratio"], atol=1e-4)
    items["source.values"] = np.full_like(items["source.values"], 50)
    with pytest.raises(Invalid, match="token id 50") as wrong:
        ask(*legs, method="marginal", arrays=items | {"target": target})
    assert wrong.value.item == 0
    del items["source.owners"]
    with pytest.raises(Malformed, match="values, lengths and owners"):
        ask(*legs, method="marginal", arrays=items | {"target": target})


def test_marginal_through_the_bank_is_lemma_1(ask: Any, loaded: dict[str, Loaded]) -> None:
    rng = np.random.default_rng(0)
    source, target = unit(rng, 5), unit(rng, 7)
    found = ask(
        ("one", "image", "text"),
        ("one", "text", "state"),
        method="marginal",
        arrays={"source": source, "target": target},
    )
    bank = bank_of(loaded["one"], "text", "image+text", "state+text")
    expected = expected_marginal(source, target, (bank, bank))
    np.testing.assert_allclose(by_target(found, "log_ratio"), expected, atol=1e-4)
    assert (np.diff(found.arrays["score"], axis=1) <= 0).all()
    # Without a prior it is uniform over the targets.
    np.testing.assert_allclose(found.arrays["log_normaliser"], log_mean_exp(expected, axis=1)[:, 0], atol=1e-4)
    document = ComposeAnswer.model_validate(found.document)
    assert document.bridge_size == 96
    assert document.normalised
    assert document.effective_sample_size is not None
    assert all(1 <= size <= 96 for size in document.effective_sample_size)
    assert document.value_trusted == (float(np.median(document.effective_sample_size)) >= 10)
    assert document.direct_marginal_spearman is not None
    assert all(-1 <= value <= 1 for value in document.direct_marginal_spearman if value is not None)
    assert document.bridge_resultant == pytest.approx(np.linalg.norm(bank.mean(0)), abs=1e-5)


def test_marginal_through_given_items_uses_them_and_nothing_else(ask: Any) -> None:
    rng = np.random.default_rng(1)
    arrays = {"source": unit(rng, 3), "target": unit(rng, 4), "bridge.0": unit(rng, 500), "bridge.1": unit(rng, 500)}
    found = ask(("none", "image", "text"), ("two", "text", "state"), method="marginal", arrays=arrays, bank=False)
    expected = expected_marginal(arrays["source"], arrays["target"], (arrays["bridge.0"], arrays["bridge.1"]))
    np.testing.assert_allclose(by_target(found, "log_ratio"), expected, atol=1e-4)
    assert found.document["bridge_size"] == 500
    assert found.document["direct_marginal_spearman"] is None  # the two spaces have nothing in common


def test_legs_of_two_models_embed_the_union_of_their_banks_each_with_its_own(
    ask: Any, loaded: dict[str, Loaded]
) -> None:
    rng = np.random.default_rng(2)
    source, target = unit(rng, 3), unit(rng, 4)
    legs = (("one", "image", "text"), ("two", "text", "state"))
    found = ask(*legs, method="marginal", arrays={"source": source, "target": target})
    items = [loaded["one"].banks["image+text"].items["text"], loaded["two"].banks["state+text"].items["text"]]
    with torch.inference_mode():
        bridges = tuple(
            np.concatenate([loaded[name].model.encode("text", each).numpy() for each in items])
            for name in ("one", "two")
        )
    np.testing.assert_allclose(
        by_target(found, "log_ratio"), expected_marginal(source, target, (bridges[0], bridges[1])), atol=1e-3
    )
    again = ask(*legs, method="marginal", arrays={"source": source, "target": target})
    np.testing.assert_array_equal(found.arrays["log_ratio"], again.arrays["log_ratio"])


def test_direct_on_a_trained_pair_removes_each_source_offset(ask: Any, loaded: dict[str, Loaded]) -> None:
    rng = np.random.default_rng(3)
    source, target = unit(rng, 5), unit(rng, 6)
    found = ask(("one", "image", "text"), method="direct", arrays={"source": source, "target": target})
    bank = bank_of(loaded["one"], "text", "image+text")
    f, normaliser = SCALE * source @ target.T, SCALE * source.astype(float) @ bank.T
    expected = f - log_mean_exp(normaliser, axis=1)
    np.testing.assert_allclose(by_target(found, "log_ratio"), expected, atol=1e-4)
    weights = np.exp(normaliser)
    size = weights.sum(1) ** 2 / (weights**2).sum(1)
    np.testing.assert_allclose(found.arrays["standard_error"][:, 0], np.sqrt(1 / size - 1 / len(bank)), atol=1e-4)
    np.testing.assert_allclose(found.document["effective_sample_size"], size, rtol=1e-4)
    assert found.document["normalised"]


def test_direct_on_a_trained_pair_without_a_bank_says_that_the_offset_stays(ask: Any) -> None:
    rng = np.random.default_rng(4)
    source, target = unit(rng, 2), unit(rng, 3)
    found = ask(("none", "image", "text"), method="direct", arrays={"source": source, "target": target})
    np.testing.assert_allclose(by_target(found, "log_ratio"), SCALE * source @ target.T, atol=1e-4)
    assert np.isnan(found.arrays["standard_error"]).all()
    assert not found.document["normalised"]
    assert not found.document["value_trusted"]
    assert found.document["warnings"]


@pytest.mark.parametrize("legs", [[("one", "image", "state")], [("one", "image", "text"), ("one", "text", "state")]])
def test_direct_on_an_untrained_pair_ranks_and_claims_nothing_more(ask: Any, legs: Any) -> None:
    rng = np.random.default_rng(5)
    source, target = unit(rng, 4), unit(rng, 9)
    found = ask(*legs, method="direct", arrays={"source": source, "target": target}, top_k=3)
    cosine = source @ target.T
    np.testing.assert_array_equal(found.arrays["index"], np.argsort(-cosine, axis=1)[:, :3])
    np.testing.assert_allclose(found.arrays["score"], -np.sort(-cosine, axis=1)[:, :3], atol=1e-6)
    for name in ("log_ratio", "standard_error", "log_normaliser"):
        assert np.isnan(found.arrays[name]).all()
    assert not found.document["value_trusted"]


def test_a_prior_ranks_and_weighs_and_a_prior_of_zero_stays_a_number(ask: Any) -> None:
    rng = np.random.default_rng(6)
    source, target = unit(rng, 3), unit(rng, 4)
    prior = np.array([0.1, 0.9, 0.0, 0.0])
    with np.errstate(divide="ignore"):
        log_prior = np.log(prior).astype(np.float32)
    arrays = {"source": source, "target": target}
    plain = ask(("one", "image", "text"), method="direct", arrays=arrays)
    found = ask(("one", "image", "text"), method="direct", arrays=arrays | {"log_prior": log_prior})
    ratio = by_target(plain, "log_ratio")
    np.testing.assert_allclose(found.arrays["log_normaliser"], np.log(np.exp(ratio) @ prior), atol=1e-4)
    assert set(found.arrays["index"][:, 2:].ravel()) == {2, 3}
    for name in ("score", "log_ratio"):
        assert np.isfinite(found.arrays[name]).all()


def test_a_question_larger_than_a_step_is_answered_as_one(ask: Any, loaded: dict[str, Loaded]) -> None:
    rng = np.random.default_rng(7)
    source, target = unit(rng, 300), unit(rng, 3000)
    legs = (("one", "image", "text"), ("one", "text", "state"))
    found = ask(*legs, method="marginal", arrays={"source": source, "target": target}, top_k=5)
    bank = bank_of(loaded["one"], "text", "image+text", "state+text")
    for at in (0, 150, 299):
        expected = expected_marginal(source[at : at + 1], target, (bank, bank))[0]
        np.testing.assert_array_equal(found.arrays["index"][at], np.argsort(-expected)[:5])
        np.testing.assert_allclose(found.arrays["log_ratio"][at], -np.sort(-expected)[:5], atol=1e-4)


def test_vectors_need_not_be_unit_length(ask: Any) -> None:
    rng = np.random.default_rng(8)
    source, target = unit(rng, 2), unit(rng, 3)
    legs = ("one", "image", "text")
    one = ask(legs, method="direct", arrays={"source": source, "target": target})
    two = ask(legs, method="direct", arrays={"source": 5 * source, "target": target / 3})
    np.testing.assert_allclose(one.arrays["log_ratio"], two.arrays["log_ratio"], atol=1e-4)


IMAGE_TEXT, TEXT_STATE = ("one", "image", "text"), ("one", "text", "state")
GOOD = {"source": np.ones((1, 8), np.float32), "target": np.ones((1, 8), np.float32)}


@pytest.mark.parametrize(
    ("legs", "method", "bank", "arrays", "message"),
    [
        ([], "direct", True, {}, "one leg at least"),
        ([IMAGE_TEXT] * 3, "marginal", True, {}, "do not meet"),
        ([IMAGE_TEXT], "marginal", True, {}, "there is one"),
        ([IMAGE_TEXT, ("one", "state", "text")], "marginal", True, {}, "do not meet"),
        ([("one", "image", "smell")], "direct", True, {}, "no modality 'smell'"),
        ([("one", "code", "image"), ("one", "image", "text")], "marginal", True, {}, "trained pairs are code.text"),
        ([IMAGE_TEXT, ("two", "text", "state")], "direct", True, {}, "encode 'text' differently"),
        ([("none", "image", "text"), TEXT_STATE], "marginal", True, {}, "no bank .*`through`"),
        ([("vectors", "image", "text"), TEXT_STATE], "marginal", True, {}, "keep the items .*`through`"),
        ([IMAGE_TEXT], "direct", True, {"source": np.ones((1, 7), np.float32)}, "7 values"),
        ([IMAGE_TEXT], "direct", True, {"source": np.zeros((1, 8), np.float32)}, "no direction"),
        ([IMAGE_TEXT], "direct", True, {"target": np.full((1, 8), np.nan, np.float32)}, "no direction"),
        ([IMAGE_TEXT], "direct", True, {"target": np.ones((1, 8))}, "float32"),
        ([IMAGE_TEXT], "direct", True, {"log_prior": np.full(1, -np.inf, np.float32)}, "prior"),
        ([IMAGE_TEXT], "direct", True, {"log_prior": np.full(1, np.nan, np.float32)}, "prior"),
        ([IMAGE_TEXT], "direct", True, {"log_prior": np.zeros(2, np.float32)}, "one number for each"),
        ([IMAGE_TEXT, TEXT_STATE], "marginal", False, {}, r"bridge\.0"),
    ],
)
def test_what_cannot_be_composed_is_refused_with_the_reason(
    ask: Any, legs: Any, method: str, bank: bool, arrays: Arrays, message: str
) -> None:
    with pytest.raises(IsthmusError, match=message) as caught:
        ask(*legs, method=method, bank=bank, arrays=GOOD | arrays)
    assert isinstance(caught.value, Invalid | Malformed)


def test_bridges_that_are_no_pair_are_refused(ask: Any) -> None:
    rng = np.random.default_rng(9)
    arrays = GOOD | {"bridge.0": unit(rng, 3), "bridge.1": unit(rng, 4)}
    with pytest.raises(Malformed, match="same items"):
        ask(IMAGE_TEXT, TEXT_STATE, method="marginal", bank=False, arrays=arrays)


def test_same_weights_under_two_names_can_be_compared(
    ask: Any, models: Store, refs: dict[str, ModelRef], publish_model: Any
) -> None:
    refs["twin"] = publish_model(models, "models/twin/1", seed=1)
    found = ask(IMAGE_TEXT, ("twin", "text", "state"), method="direct", arrays=GOOD)
    assert found.arrays["score"][0, 0] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("keep", ["items", "vectors"])
def test_each_leg_has_its_own_scale_and_the_posterior_is_the_softmax_over_the_targets(
    ask: Any, models: Store, refs: dict[str, ModelRef], publish_model: Any, folder: Path, keep: str
) -> None:
    """With the scales exchanged or left out nothing here would hold. For legs of one model the vectors suffice."""
    name = f"uneven-{keep}"
    scales = {"image+text": math.log(9.0), "state+text": math.log(2.0)}
    refs[name] = publish_model(models, f"models/{name}/1", seed=5, keep=keep, log_scales=scales)
    rng = np.random.default_rng(10)
    source, target = unit(rng, 4), unit(rng, 6)
    prior = rng.random(6)
    log_prior = np.log(prior / prior.sum())
    found = ask(
        (name, "image", "text"),
        (name, "text", "state"),
        method="marginal",
        arrays={"source": source, "target": target, "log_prior": log_prior.astype(np.float32)},
    )
    bank = bank_of(load_model(folder / "store" / refs[name].artifact, "cpu"), "text", "image+text", "state+text")
    f, g = 9.0 * source.astype(float) @ bank.T.astype(float), 2.0 * bank.astype(float) @ target.T.astype(float)
    ratio = log_mean_exp(f[:, :, None] + g[None], axis=1)[:, 0] - log_mean_exp(f, axis=1) - log_mean_exp(g, axis=0)
    np.testing.assert_allclose(by_target(found, "log_ratio"), ratio, atol=1e-5)
    weights = np.exp(log_prior + ratio)
    posterior = np.exp(by_target(found, "log_ratio") + log_prior - found.arrays["log_normaliser"][:, None])
    np.testing.assert_allclose(posterior, weights / weights.sum(1, keepdims=True), atol=1e-5)


def test_a_prior_needs_a_ratio_to_weigh(ask: Any) -> None:
    log_prior = np.log(np.array([1.0], np.float32))
    for legs in ([("one", "image", "state")], [IMAGE_TEXT, TEXT_STATE]):
        with pytest.raises(Invalid, match="a prior weighs ratios") as caught:
            ask(*legs, method="direct", arrays=GOOD | {"log_prior": log_prior})
        assert caught.value.param == "prior"


def test_a_pair_trained_by_regression_is_compared_and_never_summed(
    ask: Any, refs: dict[str, ModelRef], models: Store, publish_model: Any
) -> None:
    refs["square"] = publish_model(models, "models/square/1", seed=6, loss={"kind": "square"})
    legs = ("square", "image", "text"), ("square", "text", "state")
    found = ask(legs[0], method="direct", arrays=GOOD)
    assert np.isnan(found.arrays["log_ratio"]).all()
    with pytest.raises(Invalid, match="trained by regression") as caught:
        ask(*legs, method="marginal", arrays=GOOD)
    assert caught.value.code == "no_ratio"
    with pytest.raises(Invalid, match="trained by regression"):
        ask(legs[0], method="direct", arrays=GOOD | {"log_prior": np.zeros(1, np.float32)})


def test_only_the_cosine_needs_a_direction(
    ask: Any, refs: dict[str, ModelRef], models: Store, publish_model: Any
) -> None:
    refs["dot"] = publish_model(models, "models/dot/1", seed=7, loss={"kind": "info_nce", "critic": "dot"})
    zero = np.zeros((1, 8), np.float32)
    found = ask(("dot", "image", "text"), ("dot", "text", "state"), method="marginal", arrays=GOOD | {"source": zero})
    np.testing.assert_allclose(found.arrays["log_ratio"], 0, atol=1e-5)
    with pytest.raises(Invalid, match="not finite"):
        ask(("dot", "image", "text"), method="direct", arrays=GOOD | {"source": zero + np.float32(np.inf)})


def test_a_step_over_a_large_bridge_is_a_small_one() -> None:
    """Few sources and few targets at once: what lies in memory does not grow with either, nor do the steps."""
    rng = np.random.default_rng(11)
    source, target, bridge = unit(rng, 300), unit(rng, 2000), torch.zeros(1 << 20, 8)
    chain = Chain((Link("cosine", 1.0), Link("cosine", 1.0)), (Bridge(bridge, bridge),))
    for way in (Summed(chain, comparable=True), Trained("cosine", 1.0, 0.0, bridge)):
        composer = Composer(way, source, target, log_prior=None, top_k=1, device=CPU)
        assert composer._sizes.sources * len(bridge) <= 1 << 22
        assert composer._sizes.weighed * len(bridge) <= 1 << 22
        lengths = {entry.length for entry in composer.entries()}
        assert len(lengths) == 1  # so that they stay in order
        assert max(lengths) << 16 <= 1 << 31


def test_what_the_memory_does_not_hold_may_be_asked_again() -> None:
    bank = torch.ones(1, 8).expand(1 << 48, 8)
    z = unit(np.random.default_rng(0), 2)
    composer = Composer(Trained("cosine", 1.0, 0.0, bank), z, z, log_prior=None, top_k=1, device=CPU)
    with pytest.raises(Unavailable, match="has not the memory") as caught:
        composer.answer_at_once()
    assert caught.value.code == "out_of_memory"
