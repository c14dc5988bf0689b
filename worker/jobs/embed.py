"""Embed one modality of a data set into an embedding set, whose files `service.contract.vectors` describes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.contract.errors import Permanent
from service.contract.jobs import EmbedArgs, EmbedResult
from service.contract.vectors import PARQUET, VECTORS, Strings, write_index
from worker.learning.data import ENCODE_BATCH, Encoder, TokenSource, open_dataset
from worker.learning.device import choose_device
from worker.learning.model import load_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jaxtyping import Float32, Int64

    from service.contract.samples import Samples, Split
    from worker.learning.model import Loaded
    from worker.learning.reading import Dataset
    from worker.runner import Context

GROUP_BYTES: Final = 32 << 20  # of vectors in a row group of the Parquet file: a reader holds one of them


def run(args: EmbedArgs, ctx: Context) -> EmbedResult:
    """Embed and publish; memory holds a batch at a time, however large the data set.

    Raises Permanent if the model or the data set lacks the modality, or the split is empty.
    """
    device = choose_device(ctx.device)
    given = ctx.inputs[args.model]
    loaded = load_model(ctx.store.local(given["artifact"]), device)
    chosen = choose(loaded, args.model, open_dataset(args.dataset, ctx), args.modality, args.split)
    folder = ctx.scratch / "embeddings"
    folder.mkdir()
    started, num = time.monotonic(), len(chosen.indices)

    def report(done: int) -> None:
        ctx.progress(done, num, (num - done) * (time.monotonic() - started) / done)

    vectors = chosen.embed(
        Encoder(loaded.model, device, lambda _: ctx.check()), folder, batch_size=args.batch_size, report=report
    )
    samples = chosen.dataset.samples
    write_index(folder, Strings.of(map(samples.key, chosen.indices.tolist())))
    _write_table(folder, samples, chosen.indices, vectors, ctx.check)
    dimensions = vectors.shape[1]
    del vectors

    embeddings_id = "emb_" + ctx.job.partition("_")[2]
    key = f"embeddings/{embeddings_id}/{ctx.epoch}"
    body = {
        "model": args.model,
        "model_digest": given["digest"],
        "dataset": args.dataset,
        "dataset_digest": chosen.dataset.digest,
        "modality": args.modality,
        "split": args.split,
        "num_vectors": num,
        "dimensions": dimensions,
    }
    manifest = ctx.store.publish(folder, key, kind="embeddings", id=embeddings_id, body=body)
    return EmbedResult(
        artifact=key,
        model=args.model,
        model_digest=given["digest"],
        modality=args.modality,
        num_vectors=num,
        dimensions=dimensions,
        num_bytes=manifest.num_bytes,
        digest=manifest.digest,
        dataset=args.dataset,
        split=args.split,
    )


@final
@dataclass(frozen=True)
class Chosen:
    """Samples that a model is to embed."""

    loaded: Loaded
    dataset: Dataset
    source: TokenSource
    indices: Int64[np.ndarray, " sample"]

    def embed(
        self, encoder: Encoder, folder: Path, *, batch_size: int = ENCODE_BATCH, report: Callable[[int], None]
    ) -> Float32[np.ndarray, "sample dim"]:
        """Write the vectors to a file of the folder, and return them mapped; `report` hears how many there are."""
        shape = len(self.indices), self.loaded.recipe.dimensions
        vectors = np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=np.float32, shape=shape)
        done = 0
        for z in encoder.in_batches(self.source, self.indices, batch_size):
            vectors[done : done + len(z)] = z.numpy()
            done += len(z)
            report(done)
        vectors.flush()
        return vectors


def choose(loaded: Loaded, model: str, dataset: Dataset, modality: str, split: Split) -> Chosen:
    """Find the samples of a split in one modality.

    Raises Permanent if the model or the data set lacks the modality, or the split is empty.
    """
    if modality not in loaded.recipe.towers:
        known = ", ".join(sorted(loaded.recipe.towers))
        raise Permanent(f"model {model} has no modality {modality!r}; it has {known}")
    source = TokenSource(dataset, modality, loaded.tokenisers[modality])
    indices = dataset.samples.indices(split)
    if not len(indices):
        raise Permanent(f"data set {dataset.name} has no samples in split {split!r}", code="empty_split")
    return Chosen(loaded, dataset, source, indices)


def _write_table(
    folder: Path,
    samples: Samples,
    indices: Int64[np.ndarray, " sample"],
    vectors: Float32[np.ndarray, "sample dim"],
    check: Callable[[], None],
) -> None:
    dim = vectors.shape[1]
    schema = pa.schema(
        [
            ("key", pa.string()),
            ("label", pa.string()),
            ("split", pa.string()),
            ("vector", pa.list_(pa.float32(), dim)),
        ]
    )
    num_rows = max(1, GROUP_BYTES // (4 * dim))
    # Vectors repeat nothing: a dictionary of them would be their size once more.
    columns: Any = ["label", "split"]  # pyarrow's stubs know of no list
    with pq.ParquetWriter(folder / PARQUET, schema, use_dictionary=columns) as table:
        for start in range(0, len(indices), num_rows):
            check()
            rows = indices[start : start + num_rows].tolist()
            table.write_batch(
                pa.record_batch(
                    [
                        pa.array(map(samples.key, rows), pa.string()),
                        pa.array(map(samples.label, rows), pa.string()),
                        pa.array(("holdout" if samples.split[row] else "train" for row in rows), pa.string()),
                        pa.FixedSizeListArray.from_arrays(pa.array(vectors[start : start + num_rows].reshape(-1)), dim),
                    ],
                    schema=schema,
                ),
                row_group_size=num_rows,
            )
