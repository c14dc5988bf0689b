from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from service.contract.errors import Cancelled, Permanent
from service.contract.jobs import EmbedArgs
from worker.jobs import embed


def test_vectors_are_unit_and_stand_beside_their_keys(trained: Any) -> None:
    args = EmbedArgs(model="model_a", dataset="ds_imu", modality="imu", split="holdout", batch_size=33)
    result = embed.run(args, trained.context("job_embed"))
    assert result.artifact == "embeddings/emb_embed/1"
    assert (result.num_vectors, result.dimensions) == (80, 16)
    assert result.model_digest == trained.inputs["model_a"]["digest"]
    assert (result.dataset, result.split) == ("ds_imu", "holdout")
    folder = trained.store.local(result.artifact)
    vectors = np.load(folder / "vectors.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    table = pq.read_table(folder / "embeddings.parquet")
    assert table.column_names == ["key", "label", "split", "vector"]
    assert table["key"].to_pylist() == [f"i{at}" for at in range(0, 400, 5)]
    assert set(table["split"].to_pylist()) == {"holdout"}
    assert table["label"][1].as_py() == "five"
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), vectors)
    body = trained.store.manifest(result.artifact).body
    assert (body["modality"], body["num_vectors"], body["dataset"]) == ("imu", 80, "ds_imu")
    assert trained.said("job_embed", "progress")[-1]["done"] == 80


def test_batches_do_not_change_the_vectors(trained: Any) -> None:
    vectors: list[np.ndarray] = []
    for job, size in (("job_one", 400), ("job_many", 7)):
        args = EmbedArgs(model="model_a", dataset="ds_codes", modality="codes", batch_size=size)
        result = embed.run(args, trained.context(job))
        vectors.append(np.load(trained.store.local(result.artifact) / "vectors.npy"))
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def test_what_is_not_there_is_named(trained: Any) -> None:
    with pytest.raises(Permanent, match="model model_a has no modality 'smell'; it has codes, imu, text"):
        embed.run(EmbedArgs(model="model_a", dataset="ds_imu", modality="smell"), trained.context("job_smell"))
    with pytest.raises(Permanent, match="data set ds_imu has no modality 'codes'"):
        embed.run(EmbedArgs(model="model_a", dataset="ds_imu", modality="codes"), trained.context("job_absent"))


def test_a_cancelled_job_publishes_nothing(trained: Any) -> None:
    context = trained.context("job_cancelled")
    context.ask("cancel")
    with pytest.raises(Cancelled):
        embed.run(EmbedArgs(model="model_a", dataset="ds_imu", modality="imu"), context)
    assert not trained.store.exists("embeddings/emb_cancelled/1")
