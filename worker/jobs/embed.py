"""Embed one modality of a data set into an embedding set: `vectors.npy` and `embeddings.parquet`, row for row alike."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.contract.errors import Permanent
from service.contract.jobs import EmbedArgs, EmbedResult
from worker.learning.data import Encoder, TokenSource, open_dataset
from worker.learning.device import choose_device
from worker.learning.model import load_model

if TYPE_CHECKING:
    from worker.runner import Context


def run(args: EmbedArgs, ctx: Context) -> EmbedResult:
    """Embed and publish; memory holds a batch at a time, however large the data set.

    Raises Permanent if the model or the data set lacks the modality, or the split is empty.
    """
    device = choose_device(ctx.device)
    given = ctx.inputs[args.model]
    loaded = load_model(ctx.store.local(given["artifact"]), device)
    dataset = open_dataset(args.dataset, ctx)
    if args.modality not in loaded.recipe.towers:
        raise Permanent(
            f"model {args.model} has no modality {args.modality!r}; it has {', '.join(sorted(loaded.recipe.towers))}"
        )
    source = TokenSource(dataset, args.modality, loaded.tokenisers[args.modality])
    indices = dataset.samples.indices(args.split)
    if not len(indices):
        raise Permanent(f"data set {args.dataset} has no samples in split {args.split!r}", code="empty_split")

    folder = ctx.scratch / "embeddings"
    folder.mkdir()
    dimensions, started = loaded.recipe.dimensions, time.monotonic()
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("label", pa.string()),
            ("split", pa.string()),
            ("vector", pa.list_(pa.float32(), dimensions)),
        ]
    )
    vectors = np.lib.format.open_memmap(
        folder / "vectors.npy", mode="w+", dtype=np.float32, shape=(len(indices), dimensions)
    )
    encoder, done = Encoder(loaded.model, device, lambda _: ctx.check()), 0
    with pq.ParquetWriter(folder / "embeddings.parquet", schema) as table:
        for z in encoder.in_batches(source, indices, args.batch_size):
            rows = indices[done : done + len(z)].tolist()
            vectors[done : done + len(z)] = z.numpy()
            table.write_batch(
                pa.record_batch(
                    [
                        pa.array([dataset.samples.key(row) for row in rows], pa.string()),
                        pa.array([dataset.samples.label(row) for row in rows], pa.string()),
                        pa.array(["holdout" if dataset.samples.split[row] else "train" for row in rows], pa.string()),
                        pa.FixedSizeListArray.from_arrays(pa.array(z.numpy().reshape(-1)), dimensions),
                    ],
                    schema=schema,
                )
            )
            done += len(z)
            ctx.progress(done, len(indices), (len(indices) - done) * (time.monotonic() - started) / done)
    vectors.flush()
    del vectors

    embeddings_id = "emb_" + ctx.job.partition("_")[2]
    key = f"embeddings/{embeddings_id}/{ctx.epoch}"
    body = {
        "model": args.model,
        "model_digest": given["digest"],
        "dataset": args.dataset,
        "dataset_digest": dataset.digest,
        "modality": args.modality,
        "split": args.split,
        "num_vectors": len(indices),
        "dimensions": dimensions,
    }
    manifest = ctx.store.publish(folder, key, kind="embeddings", id=embeddings_id, body=body)
    return EmbedResult(
        artifact=key,
        model=args.model,
        model_digest=given["digest"],
        modality=args.modality,
        num_vectors=len(indices),
        dimensions=dimensions,
        num_bytes=manifest.num_bytes,
    )
