"""What the inference process can do: one match over the calls of the wire."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final, assert_never, final

import numpy as np
import torch

from service.contract.errors import Invalid, Malformed
from service.contract.wire import ComposeCall, EmbedCall, ExamineAnswer, ExamineCall
from worker.composition import examination
from worker.serving import legs
from worker.serving.batcher import Batcher, Entry, Ticket
from worker.serving.compose import Composer
from worker.serving.encode import encode_items, entries, within_memory
from worker.serving.ways import Compared

if TYPE_CHECKING:
    from service.contract.diagnostics import PairDiagnostics
    from service.contract.wire import AnyCall, Arrays, ModelRef
    from worker.learning.model import Loaded
    from worker.serving.bridge import Bridges
    from worker.serving.residency import Residency
    from worker.serving.sets import Sets

ITEMS: Final = ("values", "lengths", "owners")
_number: Final = count()


@final
@dataclass(frozen=True)
class Parts:
    """What the operations work with."""

    residency: Residency
    batcher: Batcher
    bridges: Bridges
    sets: Sets
    device: torch.device


@final
@dataclass(frozen=True)
class Answer:
    """An answer, and where its time went, in milliseconds."""

    document: dict[str, Any]
    arrays: Arrays
    queue_ms: float
    inference_ms: float


async def answer(parts: Parts, call: AnyCall, arrays: Arrays, *, deadline: float) -> Answer:
    """Answer a call before the deadline (on time.monotonic's clock).

    Raises Malformed or Invalid for what the model cannot take, NotFound for a model that is not there, Unavailable if
    the deadline passes.
    """
    match call:
        case EmbedCall():
            return await _embed(parts, call, arrays, deadline)
        case ComposeCall():
            return await _compose(parts, call, arrays, deadline)
        case ExamineCall():
            return await _examine(parts, call, deadline)
        case _:
            assert_never(call)


async def _embed(parts: Parts, call: EmbedCall, arrays: Arrays, deadline: float) -> Answer:
    return await _vectors(parts, call.model, call.modality, arrays, deadline)


async def _vectors(parts: Parts, model: ModelRef, modality: str, arrays: Arrays, deadline: float) -> Answer:
    loaded = await parts.residency.get(model)
    ticket = Ticket(
        group=("embed", model.artifact, modality),
        pace=(model.artifact, modality),
        run=lambda items: encode_items(loaded, modality, parts.device, items),
        entries=entries(loaded, modality, arrays),
        deadline=deadline,
    )
    vectors = await parts.batcher.submit(ticket)
    return Answer({}, {"vectors": np.stack(vectors)}, ticket.queue_ms, ticket.inference_ms)


async def _embed_source(parts: Parts, call: ComposeCall, arrays: Arrays, deadline: float) -> Answer:
    """Put the vectors of the source in place of its tokens."""
    sent = {name: arrays.pop(f"source.{name}") for name in ITEMS if f"source.{name}" in arrays}
    found = await _vectors(parts, call.legs[0].model, call.legs[0].from_, sent, deadline)
    arrays["source"] = found.arrays["vectors"]
    return found


async def _compose(parts: Parts, call: ComposeCall, sent: Arrays, deadline: float) -> Answer:
    before: Answer | None = None
    if call.source_items and call.legs:
        sent = dict(sent)
        before = await _embed_source(parts, call, sent, deadline)
    sets = await parts.sets.open(call.sets)
    arrays = sent | {name: each.z for name, each in sets.items()}
    composer = await composer_of(parts, call, arrays)
    ticket = Ticket(
        group=("compose", next(_number)),  # no two questions share anything that could be merged
        pace="compose",
        run=composer.run,
        entries=composer.entries(),
        deadline=deadline,
    )
    await parts.batcher.submit(ticket)
    document, found = composer.answer()
    if (target := sets.get("target")) is not None and target.keys is not None:
        keys = target.keys.take(found["index"].reshape(-1))
        found |= {"key.bytes": keys.data, "key.ends": keys.ends}
    spent = [ticket.queue_ms, ticket.inference_ms]
    if before is not None:
        spent = [spent[0] + before.queue_ms, spent[1] + before.inference_ms]
    return Answer(document, found, *spent)


async def _examine(parts: Parts, call: ExamineCall, deadline: float) -> Answer:
    loaded = await parts.residency.get(call.model)
    ways = list(examination.bridges(loaded, call.from_, call.to))
    if not ways:
        raise Invalid(f"the model keeps no banks between {call.from_} and {call.to}", code="no_bank")
    ticket = Ticket(
        group=("examine", next(_number)),
        pace="compose",
        run=lambda chosen: [_look(loaded, *ways[at]) for at in chosen],
        entries=[
            Entry(at, max(1, examination.cost(len(first.z_end) + len(second.z_end), first.z_end.shape[1]) >> 16))
            for at, (_, first, second) in enumerate(ways)
        ],
        deadline=deadline,
    )
    found = await parts.batcher.submit(ticket)
    through = {way[0]: each for way, each in zip(ways, found, strict=True)}
    document = ExamineAnswer(through=through).model_dump(mode="json")
    return Answer(document, {}, ticket.queue_ms, ticket.inference_ms)


@torch.inference_mode()
@within_memory()
def _look(loaded: Loaded, _through: str, first: examination.Leg, second: examination.Leg) -> PairDiagnostics:
    return examination.examine(loaded.recipe.critic, first, second)


async def composer_of(parts: Parts, call: ComposeCall, arrays: Arrays) -> Composer:
    """Return what answers a call; its tensors are those sent and those that its sets name.

    Raises Invalid for what cannot be composed so, NotFound and Unavailable as `answer`.
    """
    models = await asyncio.gather(*(parts.residency.get(leg.model) for leg in call.legs))
    named = list(zip(call.legs, models, strict=True))
    legs.check(named)
    source = await legs.vectors(parts.sets, call, arrays, "source", named[0][1])
    target = await legs.vectors(parts.sets, call, arrays, "target", named[-1][1])
    log_prior = _log_prior(arrays, len(target)) if call.log_prior else None
    way = await legs.settle(parts, call, named, arrays)
    if log_prior is not None and isinstance(way, Compared):
        if way.is_trained:
            message = "a prior weighs ratios, and a pair that was trained by regression gives none"
            raise Invalid(message, param="prior", code="no_ratio")
        message = "a prior weighs ratios, and comparing the vectors of an untrained pair gives none"
        raise Invalid(f"{message}: use the method marginal", param="prior", code="untrained_pair")
    path = legs.path_of(call, arrays)
    return Composer(
        way,
        source,
        target,
        log_prior=log_prior,
        top_k=call.top_k,
        device=parts.device,
        keep=lambda chain: parts.bridges.keep_offsets(path, chain.offsets),
        known=parts.bridges.known(path, call.sets["target"].artifact if "target" in call.sets else None),
    )


def _log_prior(arrays: Arrays, num: int) -> np.ndarray:
    log_prior = arrays.get("log_prior")
    if log_prior is None or log_prior.shape != (num,) or log_prior.dtype.kind != "f":
        raise Malformed("log_prior has one number for each target")
    if not (log_prior < np.inf).all() or not np.isfinite(log_prior).any():
        raise Invalid("a prior is not negative, and not every one is zero", param="prior")
    return log_prior
