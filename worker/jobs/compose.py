"""Compose whole sets: for every sample of one the best of another, block by block, with what the inference process has.

Sets stay mapped files and nothing is held that grows with both: memory has a block of sources, the bridge, and a block
of targets. An attempt that is lost leaves nothing, and the next one starts again.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from service.contract.errors import Permanent
from service.contract.jobs import ComposeArgs, ComposeResult, SamplesRef
from service.contract.joints import joints_of
from service.contract.priors import as_log_prior
from service.contract.vectors import Strings
from service.contract.wire import ComposeAnswer, ComposeCall, ComposeLeg, ModelRef, SetRef
from worker.jobs.compose_summary import Summary
from worker.jobs.embed import choose
from worker.learning.data import Encoder, open_dataset
from worker.learning.device import choose_device
from worker.learning.model import load_model
from worker.serving.batcher import Batcher
from worker.serving.bridge import Bridges
from worker.serving.operations import Parts, composer_of
from worker.serving.residency import Residency
from worker.serving.sets import Sets, open_vectors

if TYPE_CHECKING:
    from jaxtyping import Float32

    from service.contract.operations import EmbeddingSetRef
    from service.contract.wire import Arrays
    from worker.runner import Context

BLOCK: Final = 256  # sources at once: targets are read once for each block of them
MODEL_BYTES: Final = 1 << 62  # the legs' models all stay: there are eight at most
MATCHES: Final = "matches.parquet"
SUMMARY: Final = "summary.json"
SCHEMA: Final = pa.schema(
    [
        ("source", pa.string()),
        ("source_index", pa.int64()),
        ("rank", pa.int32()),
        ("target", pa.string()),
        ("target_index", pa.int64()),
        ("score", pa.float64()),
        ("log_ratio", pa.float64()),
        ("standard_error", pa.float64()),
        ("posterior", pa.float64()),
    ]
)


@final
@dataclass(frozen=True)
class End:
    """Where an operand stands: its place in the arguments, the leg's model by name, as found, and its modality."""

    at: str
    name: str
    model: ModelRef
    modality: str


@final
@dataclass(frozen=True)
class Side:
    """One end: vectors that are mapped, the keys of their rows, and the embedding set if they are one."""

    z: Float32[np.ndarray, "row dim"]
    keys: Strings
    ref: SetRef | None


def run(args: ComposeArgs, ctx: Context) -> ComposeResult:
    """Compose and publish `matches.parquet` and `summary.json`.

    Raises Permanent for vectors that a leg's model did not make, Invalid for what cannot be composed so.
    """
    assert args.legs, "the legs are settled when the job is submitted"
    legs = [
        ComposeLeg.model_validate({"model": _model(ctx, leg.model), "from": leg.from_, "to": leg.to})
        for leg in args.legs
    ]
    source = _open(ctx, args.source, End("source", args.legs[0].model, legs[0].model, legs[0].from_))
    target = _open(ctx, args.target, End("target", args.legs[-1].model, legs[-1].model, legs[-1].to))
    if args.prior is not None and len(args.prior) != len(target.z):
        raise Permanent(f"{len(args.prior)} priors for {len(target.z)} targets")
    arrays: Arrays = {"source": source.z, "target": target.z} | _bridges(ctx, args, legs)
    if args.prior is not None:
        arrays["log_prior"] = as_log_prior(args.prior)
    ends = {"source": source.ref, "target": target.ref}
    call = ComposeCall(
        legs=legs,
        method=args.method,
        bank=any(f"bridge.{2 * at}" not in arrays for at in range(len(legs) - 1)),
        log_prior=args.prior is not None,
        sets={name: ref for name, ref in ends.items() if ref is not None},
        top_k=min(args.top_k, len(target.z)),
    )
    folder = ctx.scratch / "report"
    folder.mkdir()
    summary = Summary(len(source.z), len(target.z))
    with _composing(ctx) as (runner, parts), pq.ParquetWriter(folder / MATCHES, SCHEMA) as table:
        composer = runner.run(composer_of(parts, call, arrays))  # of all sources: what is wrong with one is found now
        log_prior = arrays.get("log_prior", np.full(len(target.z), -math.log(len(target.z))))
        began = time.monotonic()
        for start in range(0, len(source.z), BLOCK):
            block = np.array(source.z[start : start + BLOCK])
            composer = composer.about(block)
            steps = composer.entries()
            for at, step in enumerate(steps, start=1):
                ctx.check()
                composer.run([step.item])
                done = start + len(block) * at / len(steps)
                ctx.progress(int(done), len(source.z), (len(source.z) - done) * (time.monotonic() - began) / done)
            document, found = composer.answer()
            answer = ComposeAnswer.model_validate(document)
            summary.add(answer, found)
            table.write_table(_rows(source.keys, target.keys, start, found, log_prior))
    described = summary.described() | {
        "source": args.source.model_dump(),
        "target": args.target.model_dump(),
        "legs": [leg.model_dump(by_alias=True) for leg in args.legs],
        "through": args.model_dump(mode="json")["through"],
        "prior": "given" if args.prior is not None else "uniform",
        "top_k": call.top_k,
    }
    (folder / SUMMARY).write_text(json.dumps(described, indent=1), encoding="utf-8")
    key = f"reports/{ctx.job}/{ctx.epoch}"
    manifest = ctx.store.publish(folder, key, kind="report", id=ctx.job, body={"summary": described})
    return ComposeResult(
        artifact=key,
        num_sources=len(source.z),
        num_targets=len(target.z),
        top_k=call.top_k,
        summary=summary.figures(),
        warnings=summary.warnings,
        num_bytes=manifest.num_bytes,
    )


def _model(ctx: Context, name: str) -> ModelRef:
    given = ctx.inputs[name]
    return ModelRef(artifact=given["artifact"], digest=given["digest"])


def _open(ctx: Context, given: EmbeddingSetRef | SamplesRef, end: End) -> Side:
    if isinstance(given, SamplesRef):
        return _embed(ctx, given, end)
    artifact = ctx.inputs[given.embeddings]["artifact"]
    body = ctx.store.manifest(artifact).body
    if body["model_digest"] != end.model.digest:
        message = f"{end.at}: {given.embeddings} holds vectors of another model than {end.name}"
        raise Permanent(message, code="model_differs")
    if body["modality"] != end.modality:
        raise Permanent(f"{end.at}: {given.embeddings} holds {body['modality']}, and the leg has {end.modality}")
    found = open_vectors(ctx.store.local(artifact))
    return Side(found.z, found.keys or Strings.of([""] * len(found)), SetRef(artifact=artifact))


def _embed(ctx: Context, given: SamplesRef, end: End) -> Side:
    """Embed the samples that no set holds yet, into a file that lives as long as this attempt."""
    device = choose_device(ctx.device)
    loaded = load_model(ctx.store.local(end.model.artifact), device)
    chosen = choose(loaded, end.name, open_dataset(given.dataset, ctx), end.modality, given.split)
    folder = ctx.scratch / end.at
    folder.mkdir()
    ctx.event("embedding", {"side": end.at, "samples": len(chosen.indices)})
    z = chosen.embed(Encoder(loaded.model, device, lambda _: ctx.check()), folder, report=lambda _: None)
    return Side(z, Strings.of(map(chosen.dataset.samples.key, chosen.indices.tolist())), None)


def _bridges(ctx: Context, args: ComposeArgs, legs: list[ComposeLeg]) -> Arrays:
    """Map the bridges that are embedding sets; those of banks are found with the models."""
    if args.method == "direct":
        return {}
    names = args.legs or []
    found: Arrays = {}
    for at, asked in enumerate(joints_of(args.through, args.bridge_weights, len(legs) - 1)):
        if asked.is_bank:
            continue
        refs = asked.sets
        for number in (at, at + 1):
            ref = refs[(number - at) % len(refs)]  # legs of one model share one set
            end = End(f"{asked.param}[{number - at}]", names[number].model, legs[number].model, legs[at].to)
            found[f"bridge.{at + number}"] = _open(ctx, ref, end).z
        if asked.weights is not None:
            found[f"bridge_weights.{at}"] = np.array(asked.weights, np.float64)
    return found


@contextmanager
def _composing(ctx: Context) -> Generator[tuple[asyncio.Runner, Parts]]:
    device = choose_device(ctx.device)
    batcher = Batcher(max_tokens=1 << 14, max_waiting=1 << 24)  # embeds the items of a bridge between two models
    batcher.start()
    residency = Residency(ctx.store, device=device, max_bytes=MODEL_BYTES)
    try:
        with asyncio.Runner() as runner:
            yield runner, Parts(residency, batcher, Bridges(residency, batcher, device=device), Sets(ctx.store), device)
    finally:
        batcher.stop()


def _rows(sources: Strings, targets: Strings, start: int, found: Arrays, log_prior: np.ndarray) -> pa.Table:
    index = found["index"]
    num, top_k = index.shape
    ratio = found["log_ratio"].astype(np.float64)
    posterior = np.exp(log_prior[index] + ratio - found["log_normaliser"].astype(np.float64)[:, None])
    at = np.repeat(np.arange(start, start + num), top_k)
    columns = {
        "source": np.repeat(np.array(sources.take(np.arange(start, start + num)).decoded(), object), top_k),
        "source_index": at,
        "rank": np.tile(np.arange(top_k, dtype=np.int32), num),
        "target": np.array(targets.take(index.reshape(-1)).decoded(), object),
        "target_index": index.reshape(-1).astype(np.int64),
        "score": found["score"].reshape(-1).astype(np.float64),
        "log_ratio": ratio.reshape(-1),
        "standard_error": found["standard_error"].reshape(-1).astype(np.float64),
        "posterior": np.minimum(posterior, 1.0).reshape(-1),
    }
    # What the method does not state is NaN there, and null in a table.
    return pa.table([pa.array(columns[field.name], field.type, from_pandas=True) for field in SCHEMA], schema=SCHEMA)
