"""What the inference process can do: one match over the calls of the wire."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final, assert_never, final

import numpy as np
import torch

from service.contract.errors import Invalid, Malformed
from service.contract.recipe import pair_name
from service.contract.wire import ComposeCall, EmbedCall
from worker.learning import critics
from worker.serving.batcher import Batcher, Ticket
from worker.serving.compose import Compared, Composer, Summed, Trained, Way
from worker.serving.encode import encode_items, entries, within_memory
from worker.serving.sets import check_vectors

if TYPE_CHECKING:
    from service.contract.recipe import Recipe
    from service.contract.wire import Arrays, ComposeLeg
    from worker.learning.model import Loaded
    from worker.serving.bridge import Bridges
    from worker.serving.residency import Residency
    from worker.serving.sets import Sets

_number: Final = count()
Legs = list[tuple["ComposeLeg", "Loaded"]]


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


async def answer(parts: Parts, call: EmbedCall | ComposeCall, arrays: Arrays, *, deadline: float) -> Answer:
    """Answer a call before the deadline (on time.monotonic's clock).

    Raises Malformed or Invalid for what the model cannot take, NotFound for a model that is not there, Unavailable if
    the deadline passes.
    """
    match call:
        case EmbedCall():
            return await _embed(parts, call, arrays, deadline)
        case ComposeCall():
            return await _compose(parts, call, arrays, deadline)
        case _:
            assert_never(call)


async def _embed(parts: Parts, call: EmbedCall, arrays: Arrays, deadline: float) -> Answer:
    loaded = await parts.residency.get(call.model)
    ticket = Ticket(
        group=("embed", call.model.artifact, call.modality),
        pace=(call.model.artifact, call.modality),
        run=lambda items: encode_items(loaded, call.modality, parts.device, items),
        entries=entries(loaded, call.modality, arrays),
        deadline=deadline,
    )
    vectors = await parts.batcher.submit(ticket)
    return Answer({}, {"vectors": np.stack(vectors)}, ticket.queue_ms, ticket.inference_ms)


async def _compose(parts: Parts, call: ComposeCall, sent: Arrays, deadline: float) -> Answer:
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
    document, found = composer.answer(await parts.batcher.submit(ticket))
    if (target := sets.get("target")) is not None and target.keys is not None:
        keys = target.keys.take(found["index"].reshape(-1))
        found |= {"key.bytes": keys.data, "key.ends": keys.ends}
    return Answer(document, found, ticket.queue_ms, ticket.inference_ms)


async def composer_of(parts: Parts, call: ComposeCall, arrays: Arrays) -> Composer:
    """Return what answers a call; its tensors are those sent and those that its sets name.

    Raises Invalid for what cannot be composed so, NotFound and Unavailable as `answer`.
    """
    if not 1 <= len(call.legs) <= 2:
        raise Invalid("one or two legs can be composed", param="legs", code="legs")
    models = await asyncio.gather(*(parts.residency.get(leg.model) for leg in call.legs))
    legs = list(zip(call.legs, models, strict=True))
    _check_legs(legs)
    source = await _vectors(parts, call, arrays, "source", legs[0][1].recipe)
    target = await _vectors(parts, call, arrays, "target", legs[-1][1].recipe)
    log_prior = _log_prior(arrays, len(target)) if call.log_prior else None
    way = await _way(parts, call, legs, arrays)
    if log_prior is not None and isinstance(way, Compared):
        if way.is_trained:
            message = "a prior weighs ratios, and a pair that was trained by regression gives none"
            raise Invalid(message, param="prior", code="no_ratio")
        message = "a prior weighs ratios, and comparing the vectors of an untrained pair gives none"
        raise Invalid(f"{message}: use the method marginal", param="prior", code="untrained_pair")
    return Composer(
        way,
        source,
        target,
        log_prior=log_prior,
        top_k=call.top_k,
        device=parts.device,
    )


def _check_legs(legs: Legs) -> None:
    for at, (leg, loaded) in enumerate(legs):
        for modality in (leg.from_, leg.to):
            if modality not in loaded.recipe.towers:
                known = ", ".join(loaded.recipe.towers)
                raise Invalid(f"the model has no modality {modality!r}; it has {known}", param=f"legs[{at}]")
        # A single leg may be untrained: then its vectors are compared, and nothing more is claimed.
        if len(legs) == 2 and not loaded.model.is_trained(leg.from_, leg.to):
            trained = ", ".join(sorted(loaded.model.log_scales.keys()))
            message = f"{leg.from_} and {leg.to} were never trained together; the model's trained pairs are {trained}"
            raise Invalid(message, param=f"legs[{at}]", code="untrained_pair")
    if len(legs) == 2 and legs[0][0].to != legs[1][0].from_:
        raise Invalid(f"the legs do not meet: {legs[0][0].to!r} and {legs[1][0].from_!r}", param="legs", code="legs")


async def _way(parts: Parts, call: ComposeCall, legs: Legs, arrays: Arrays) -> Way:
    match call.method, legs:
        case "direct", [(leg, loaded)]:
            model, critic = loaded.model, loaded.model.critic
            if not model.is_trained(leg.from_, leg.to):
                return Compared(critic, is_trained=False, bridge=None)
            if not model.gives_ratios(leg.from_, leg.to):
                return Compared(critic, is_trained=True, bridge=None)
            bank = loaded.banks.get(pair_name(leg.from_, leg.to))
            bias = model.bias(leg.from_, leg.to)
            return Trained(
                critic,
                float(model.scale(leg.from_, leg.to)),
                0.0 if bias is None else float(bias),
                None if bank is None else bank.vectors[leg.to],
            )
        case "direct", [(leg, first), (other, second)]:
            if not await parts.bridges.comparable(legs[0], legs[1]):
                message = f"the two models encode {leg.to!r} differently, so their vectors cannot be compared"
                raise Invalid(f"{message}: use the method marginal", param="method", code="encoders_differ")
            bank = first.banks.get(pair_name(leg.from_, leg.to))
            return Compared(first.model.critic, is_trained=False, bridge=None if bank is None else bank.vectors[leg.to])
        case "marginal", [(leg, first), (other, second)]:
            for at, (each, loaded) in enumerate(legs):
                if not loaded.model.gives_ratios(each.from_, each.to):
                    message = f"{each.from_} and {each.to} were trained by regression, which gives no ratios to sum"
                    raise Invalid(f"{message}: use the method direct", param=f"legs[{at}]", code="no_ratio")
            if call.bank:
                bridges = await parts.bridges.between(legs[0], legs[1])
            else:
                given = [
                    await _vectors(parts, call, arrays, f"bridge.{at}", each.recipe)
                    for at, each in enumerate((first, second))
                ]
                bridges = await asyncio.to_thread(_given_bridge, given, first, second, parts.device)
            scales = float(first.model.scale(leg.from_, leg.to)), float(second.model.scale(other.from_, other.to))
            of_legs = first.model.critic, second.model.critic
            return Summed(of_legs, scales, bridges, comparable=await parts.bridges.comparable(legs[0], legs[1]))
        case _:
            raise Invalid("marginal sums over what joins two legs, and there is one", param="method", code="legs")


async def _vectors(parts: Parts, call: ComposeCall, arrays: Arrays, name: str, recipe: Recipe) -> np.ndarray:
    vectors = arrays.get(name)
    if vectors is None or vectors.ndim != 2 or vectors.dtype != np.float32 or not len(vectors):
        raise Malformed(f"{name} is a matrix of float32 vectors")
    if vectors.shape[1] != recipe.dimensions:
        dim = recipe.dimensions
        raise Invalid(f"{name} vectors have {vectors.shape[1]} values; the model's have {dim}", param=name)
    if name in call.sets:
        await parts.sets.check(call.sets[name], vectors, recipe.critic, param=name)
    else:
        check_vectors(vectors, recipe.critic, param=name)
    return vectors


def _log_prior(arrays: Arrays, num: int) -> np.ndarray:
    log_prior = arrays.get("log_prior")
    if log_prior is None or log_prior.shape != (num,) or log_prior.dtype.kind != "f":
        raise Malformed("log_prior has one number for each target")
    if not (log_prior < np.inf).all() or not np.isfinite(log_prior).any():
        raise Invalid("a prior is not negative, and not every one is zero", param="prior")
    return log_prior


def _given_bridge(
    given: list[np.ndarray], first: Loaded, second: Loaded, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = given
    if len(left) != len(right):
        raise Malformed("bridge.0 and bridge.1 hold the same items")
    with within_memory():
        return (
            critics.prepare(first.model.critic, torch.tensor(left, device=device)),
            critics.prepare(second.model.critic, torch.tensor(right, device=device)),
        )
