from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from service.contract.errors import Cancelled, Invalid, Permanent
from service.contract.jobs import ComposeArgs, EmbedArgs, Input
from service.contract.vectors import Strings, write_index
from worker.composition.chains import Bridge, Chain, balance
from worker.composition.estimators import marginal
from worker.composition.streaming import Link
from worker.jobs import compose, embed
from worker.learning.model import load_model
from worker.serving import compose as serving

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from worker.learning.model import Loaded

LEGS = [{"model": "model_a", "from": "imu", "to": "text"}, {"model": "model_a", "from": "text", "to": "codes"}]


@pytest.fixture(scope="module")
def sets(trained: Any) -> Any:
    """The bench with embedding sets of all of `imu` (400), `codes` (400) and of the captions beside `imu`."""
    inputs = dict(trained.inputs)
    bench = replace(trained, inputs=inputs)
    for modality, dataset in (("imu", "ds_imu"), ("codes", "ds_codes"), ("text", "ds_imu")):
        args = EmbedArgs(model="model_a", dataset=dataset, modality=modality)
        result = embed.run(args, bench.context(f"job_set{modality}"))
        inputs[f"emb_{modality}"] = Input(
            artifact=result.artifact, digest=result.digest, id=f"emb_{modality}", kind="embeddings"
        )
    return bench


@pytest.fixture(scope="module")
def loaded(sets: Any) -> Loaded:
    return load_model(sets.store.local(sets.inputs["model_a"]["artifact"]), "cpu")


def vectors(bench: Any, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(bench.store.local(bench.inputs[name]["artifact"]) / "vectors.npy"))


def args_of(**changes: Any) -> ComposeArgs:
    document: dict[str, Any] = {
        "source": {"embeddings": "emb_imu"},
        "target": {"embeddings": "emb_codes"},
        "legs": LEGS,
        "method": "marginal",
        "top_k": 5,
    }
    return ComposeArgs.model_validate(document | changes)


def legs_by_hand(bench: Any, loaded: Loaded) -> tuple[torch.Tensor, Callable[..., torch.Tensor], torch.Tensor]:
    """Return the sources' scores with the bank, what scores targets with a bridge, and the bank."""
    bridge = torch.cat([loaded.banks[pair].vectors["text"] for pair in ("imu+text", "codes+text")])
    scales = [float(loaded.model.scale(*pair)) for pair in (("imu", "text"), ("codes", "text"))]
    return scales[0] * vectors(bench, "emb_imu") @ bridge.T, lambda z, b: scales[1] * b @ z.T, bridge


def by_hand(bench: Any, loaded: Loaded, *, bridge: torch.Tensor | None = None) -> torch.Tensor:
    """Sum over the bridge with everything in memory: log-ratios of all sources and all targets."""
    f_source, f_target, bank = legs_by_hand(bench, loaded)
    if bridge is not None:
        f_source = float(loaded.model.scale("imu", "text")) * vectors(bench, "emb_imu") @ bridge.T
    scores = f_target(vectors(bench, "emb_codes"), bank if bridge is None else bridge)
    return marginal(f_source, scores, normalise=True).log_ratio


def check(bench: Any, result: Any, log_ratio: torch.Tensor) -> None:
    """Hold a job's table against all log-ratios."""
    table = pq.read_table(bench.store.local(result.artifact) / "matches.parquet").to_pydict()
    num, k = len(log_ratio), result.top_k
    index = np.array(table["target_index"]).reshape(num, k)
    best = log_ratio.topk(k, dim=1).values.numpy()
    np.testing.assert_allclose(log_ratio.gather(1, torch.from_numpy(index)), best, atol=1e-4)
    np.testing.assert_allclose(np.array(table["log_ratio"]).reshape(num, k), best, atol=1e-4)
    posterior = log_ratio.softmax(1).gather(1, torch.from_numpy(index))
    np.testing.assert_allclose(np.array(table["posterior"]).reshape(num, k), posterior, atol=1e-4)
    assert table["source"] == [f"i{row}" for row in range(num) for _ in range(k)]
    assert table["source_index"] == [row for row in range(num) for _ in range(k)]
    assert table["rank"] == [*range(k)] * num
    assert table["target"] == [f"c{at}" for at in index.reshape(-1)]
    assert (np.array(table["standard_error"]) >= 0).all()


def test_every_source_gets_its_best_targets_as_by_hand(sets: Any, loaded: Loaded) -> None:
    result = compose.run(args_of(), sets.context("job_plain"))
    assert (result.artifact, result.num_sources, result.num_targets) == ("reports/job_plain/1", 400, 400)
    check(sets, result, by_hand(sets, loaded))
    summary = json.loads((sets.store.local(result.artifact) / "summary.json").read_text())
    assert (summary["method"], summary["normalised"], summary["bridge_size"]) == ("marginal", True, 1024)
    assert summary["effective_sample_size"]["min"] <= summary["effective_sample_size"]["median"]
    assert summary["legs"] == LEGS
    assert result.summary == summary["figures"]
    assert result.summary["median_effective_sample_size"] > 1
    progress = sets.said("job_plain", "progress")
    assert (progress[-1]["done"], progress[-1]["total"]) == (400, 400)


def test_samples_are_embedded_on_the_way_and_a_set_can_be_the_bridge(sets: Any, loaded: Loaded) -> None:
    target = {"dataset": "ds_codes", "modality": "codes"}
    result = compose.run(args_of(target=target, through={"embeddings": "emb_text"}), sets.context("job_samples"))
    check(sets, result, by_hand(sets, loaded, bridge=vectors(sets, "emb_text")))


def test_a_chain_takes_a_bridge_for_each_joint_of_sets_or_banks(
    sets: Any, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """imu -> text -> codes -> text; the scores between the bridges are balanced once, whatever the blocks."""
    legs = [*LEGS, {"model": "model_a", "from": "codes", "to": "text"}]
    often = np.random.default_rng(0).integers(1, 4, 400).tolist()
    through = [
        {"through": {"embeddings": "emb_text"}, "weights": often},
        {"through": [{"embeddings": "emb_codes"}]},
    ]
    asked: list[int] = []
    balancing = serving.balancing
    monkeypatch.setattr(compose, "BLOCK", 150)
    monkeypatch.setattr(serving, "balancing", lambda *args, **how: asked.append(1) or balancing(*args, **how))
    args = args_of(legs=legs, target={"embeddings": "emb_text"}, through=through)
    result = compose.run(args, sets.context("job_chain"))
    assert asked == [1]
    text, codes = vectors(sets, "emb_text"), vectors(sets, "emb_codes")
    bridges = Bridge(text, text, torch.tensor(often).float()), Bridge(codes, codes)
    scales = [float(loaded.model.scale(leg["from"], leg["to"])) for leg in legs]
    links = [Link("cosine", scale) for scale in scales]
    chain = Chain(links, bridges, (balance(links[1], *bridges),))
    expected = chain.weigh(chain.masses(vectors(sets, "emb_imu")), text).log_ratio
    table = pq.read_table(sets.store.local(result.artifact) / "matches.parquet").to_pydict()
    index = torch.tensor(table["target_index"]).reshape(400, 5)
    best = expected.topk(5, dim=1).values
    np.testing.assert_allclose(expected.gather(1, index), best, atol=1e-3)
    np.testing.assert_allclose(np.array(table["log_ratio"]).reshape(400, 5), best, atol=1e-3)
    mixed = args_of(legs=legs, target={"embeddings": "emb_text"}, through=[through[0], {"through": None}])
    assert compose.run(mixed, sets.context("job_mixed")).num_targets == 400


def test_a_prior_weighs_the_targets(sets: Any, loaded: Loaded) -> None:
    prior = np.random.default_rng(1).random(400)
    prior[7] = 0
    result = compose.run(args_of(prior=prior.tolist(), top_k=400), sets.context("job_prior"))
    table = pq.read_table(sets.store.local(result.artifact) / "matches.parquet").to_pydict()
    index = torch.tensor(table["target_index"]).reshape(400, 400)
    found = torch.empty(400, 400, dtype=torch.float64)
    found.scatter_(1, index, torch.tensor(table["posterior"], dtype=torch.float64).reshape(400, 400))
    expected = (by_hand(sets, loaded) + torch.from_numpy(prior).log()).softmax(1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (index[:, -1] == 7).all()
    samples = {"dataset": "ds_codes", "modality": "codes"}  # how many they are nobody knew before
    with pytest.raises(Permanent, match="3 priors for 400 targets"):
        compose.run(args_of(prior=[1, 2, 3], target=samples), sets.context("job_priors"))


def test_what_the_legs_leave_open_the_first_sources_settle_for_all(sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose, "BLOCK", 150)
    result = compose.run(args_of(method="auto"), sets.context("job_open"))
    summary = json.loads((sets.store.local(result.artifact) / "summary.json").read_text())
    assert summary["method"] == "marginal"
    assert "effective sample size" in summary["reason"]
    asked: list[str] = []
    monkeypatch.setattr(serving, "choose", lambda *_, **how: asked.append("x") or ("direct", "so it is said"))
    result = compose.run(args_of(method="auto"), sets.context("job_compared"))
    summary = json.loads((sets.store.local(result.artifact) / "summary.json").read_text())
    assert (asked, summary["method"], summary["reason"]) == (["x"], "direct", "so it is said")
    table = pq.read_table(sets.store.local(result.artifact) / "matches.parquet")
    assert set(table["log_ratio"].to_pylist()) == {None}


def test_comparing_vectors_needs_no_bridge(sets: Any) -> None:
    for at, through in enumerate(({"embeddings": "emb_text"}, [{"through": {"embeddings": "emb_text"}}])):
        legs = [{"model": "model_a", "from": "imu", "to": "text"}]
        args = args_of(legs=legs, method="direct", target={"embeddings": "emb_text"}, through=through)
        assert compose.run(args, sets.context(f"job_compare{at}")).num_targets == 400


def test_a_vector_that_cannot_be_compared_is_named_before_anything_is_done(sets: Any) -> None:
    z = vectors(sets, "emb_imu").numpy().copy()
    z[300] = np.nan
    folder = sets.root / "make-bad"
    folder.mkdir()
    np.save(folder / "vectors.npy", z)
    write_index(folder, Strings.of(f"i{row}" for row in range(len(z))))
    body = {"model_digest": sets.inputs["model_a"]["digest"], "modality": "imu"}
    manifest = sets.store.publish(folder, "embeddings/emb_bad/1", kind="embeddings", id="emb_bad", body=body)
    bad = Input(artifact="embeddings/emb_bad/1", digest=manifest.digest, id="emb_bad", kind="embeddings")
    bench = replace(sets, inputs=sets.inputs | {"emb_imu": bad})
    with pytest.raises(Invalid, match=r"source\[300\]"):
        compose.run(args_of(), bench.context("job_bad"))


def test_blocks_of_any_size_find_the_same(sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[dict[str, Any]] = []
    for size in (400, 33):
        monkeypatch.setattr(compose, "BLOCK", size)
        result = compose.run(args_of(), sets.context(f"job_by{size}"))
        tables.append(pq.read_table(sets.store.local(result.artifact) / "matches.parquet").to_pydict())
    np.testing.assert_allclose(tables[0]["log_ratio"], tables[1]["log_ratio"], atol=1e-5)
    assert tables[0]["source"] == tables[1]["source"]


def test_what_a_method_does_not_state_is_null(sets: Any) -> None:
    result = compose.run(args_of(method="direct"), sets.context("job_direct"))
    table = pq.read_table(sets.store.local(result.artifact) / "matches.parquet")
    assert set(table["log_ratio"].to_pylist()) == set(table["posterior"].to_pylist()) == {None}
    scores = vectors(sets, "emb_imu") @ vectors(sets, "emb_codes").T
    found = np.array(table["score"].to_pylist()).reshape(400, 5)
    np.testing.assert_allclose(found, scores.topk(5, dim=1).values, atol=1e-5)
    assert any("never trained" in warning for warning in result.warnings)


def test_vectors_that_the_leg_did_not_make_are_refused(sets: Any) -> None:
    with pytest.raises(Permanent, match="source: emb_text holds text, and the leg has imu"):
        compose.run(args_of(source={"embeddings": "emb_text"}), sets.context("job_wrong"))
    moved = {name: Input(**given) for name, given in sets.inputs.items()}
    moved["model_a"]["digest"] = "0" * 64
    with pytest.raises(Permanent, match="another model than model_a"):
        compose.run(args_of(), replace(sets, inputs=moved).context("job_moved"))
    legs = [LEGS[0] | {"to": "codes"}, LEGS[1] | {"from": "codes"}]
    with pytest.raises(Invalid, match="never trained together"):
        compose.run(args_of(legs=legs), sets.context("job_untrained"))


def test_a_cancelled_job_publishes_nothing_and_can_be_run_again(sets: Any, loaded: Loaded) -> None:
    context = sets.context("job_stopped")
    context.ask("cancel")
    with pytest.raises(Cancelled):
        compose.run(args_of(), context)
    assert not sets.store.exists("reports/job_stopped/1")
    check(sets, compose.run(args_of(), sets.context("job_stopped", epoch=2)), by_hand(sets, loaded))


@pytest.mark.parametrize("num", [5_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_many_targets_are_looked_through_in_blocks(sets: Any, loaded: Loaded, num: int) -> None:
    rng = np.random.default_rng(3)
    z = rng.normal(size=(num, 16)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    folder = sets.root / f"make-{num}"
    folder.mkdir()
    np.save(folder / "vectors.npy", z)
    write_index(folder, Strings.of(f"c{row}" for row in range(num)))
    name, key = f"emb_{num}", f"embeddings/emb_{num}/1"
    body = {"model_digest": sets.inputs["model_a"]["digest"], "modality": "codes"}
    manifest = sets.store.publish(folder, key, kind="embeddings", id=name, body=body)
    sets.inputs[name] = Input(artifact=key, digest=manifest.digest, id=name, kind="embeddings")
    bench = replace(sets, inputs=sets.inputs | {"emb_codes": sets.inputs[name]})
    with watched() as largest:
        result = compose.run(args_of(), bench.context(f"job_{num}"))
    assert result.num_targets == num
    # All scores of the larger case are 640 MB, and a sum over them that keeps everything takes gigabytes.
    assert largest() < 300 << 20, largest()
    table = pq.read_table(bench.store.local(result.artifact) / "matches.parquet").to_pydict()
    few = [0, 255, 256, 399]
    f_source, f_target, bridge = legs_by_hand(bench, loaded)
    ratio = torch.cat(
        [
            marginal(f_source[few], f_target(part, bridge), normalise=True).log_ratio
            for part in torch.from_numpy(z).split(2000)
        ],
        1,
    )
    for row, of in zip(few, ratio, strict=True):
        begin = row * result.top_k
        best = of.topk(result.top_k)
        found = table["log_ratio"][begin : begin + result.top_k]
        np.testing.assert_allclose(found, best.values, atol=1e-4)
        assert table["target"][begin] == f"c{int(best.indices[0])}"


@contextmanager
def watched() -> Generator[Callable[[], int]]:
    """Watch by how many bytes this process's own memory grows at most; mapped files are not counted."""
    status, done, most = Path("/proc/self/status"), threading.Event(), [0]

    def own() -> int:
        lines = status.read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], own() - before)

    before, thread = own(), threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        done.set()
        thread.join()
