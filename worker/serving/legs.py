"""What the legs and the method of a call come to: which vectors are compared, or summed over which bridges.

Everything that cannot be composed so is refused here, before any arithmetic, with the reason and what would do instead.
"""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, assert_never

import numpy as np
import torch

from service.contract.errors import Invalid, Malformed
from service.contract.recipe import pair_name
from worker.composition.chains import Bridge, Chain
from worker.composition.closed_forms import fit_normal
from worker.composition.streaming import Link
from worker.learning import critics
from worker.serving.encode import within_memory
from worker.serving.sets import check_vectors
from worker.serving.ways import Closed, Compared, Summed, Trained, Way

if TYPE_CHECKING:
    from service.contract.wire import Arrays, ComposeCall, ComposeLeg
    from worker.learning.model import Loaded
    from worker.serving.bridge import Bridges
    from worker.serving.operations import Parts
    from worker.serving.sets import Sets

Leg = tuple["ComposeLeg", "Loaded"]


def check(legs: list[Leg]) -> None:
    """Raise Invalid for legs that a model does not have, that were never trained, or that do not meet."""
    if not legs:
        raise Invalid("a composition has one leg at least", param="legs", code="legs")
    for at, (leg, loaded) in enumerate(legs):
        for modality in (leg.from_, leg.to):
            if modality not in loaded.recipe.towers:
                known = ", ".join(loaded.recipe.towers)
                raise Invalid(f"the model has no modality {modality!r}; it has {known}", param=f"legs[{at}]")
        # A single leg may be untrained: then its vectors are compared, and nothing more is claimed.
        if len(legs) > 1 and not loaded.model.is_trained(leg.from_, leg.to):
            trained = ", ".join(sorted(loaded.model.log_scales.keys()))
            message = f"{leg.from_} and {leg.to} were never trained together; the model's trained pairs are {trained}"
            raise Invalid(message, param=f"legs[{at}]", code="untrained_pair")
        if at and legs[at - 1][0].to != leg.from_:
            message = f"the legs do not meet: {legs[at - 1][0].to!r} and {leg.from_!r}"
            raise Invalid(message, param="legs", code="legs")


def path_of(call: ComposeCall, arrays: Arrays) -> str | None:
    """Name the legs and models of a call whose bridges are all of banks, which stay as they are; None for others."""
    if any(name.startswith("bridge") for name in arrays):
        return None
    return " ".join(f"{leg.model.digest} {leg.from_} {leg.to}" for leg in call.legs)


async def settle(parts: Parts, call: ComposeCall, legs: list[Leg], arrays: Arrays) -> Way:
    """Return the way that answers a call.

    Raises Invalid for what cannot be composed so, Malformed for tensors that do not fit.
    """
    match call.method:
        case "direct" if len(legs) == 1:
            return _trained(legs[0])
        case "direct":
            await _check_comparable(parts.bridges, legs)
            leg, loaded = legs[0]
            bank = loaded.banks.get(pair_name(leg.from_, leg.to))
            z = None if bank is None else bank.vectors[leg.to]
            return Compared(loaded.model.critic, is_trained=False, bridge=z)
        case "marginal" | "auto":
            _check_ratios(legs, call.method)
            found = [await _bridge(parts, call, legs, at, arrays) for at in range(len(legs) - 1)]
            chain = Chain(tuple(map(_link, legs)), tuple(found), parts.bridges.offsets_of(path_of(call, arrays)))
            comparable = all([await parts.bridges.comparable(*pair) for pair in pairwise(legs)])
            return Summed(chain, comparable=comparable, is_open=call.method == "auto")
        case "analytic":
            return await _closed(parts, call, legs, arrays)
        case _:
            assert_never(call.method)


def _link(leg: Leg) -> Link:
    about, loaded = leg
    return Link(loaded.model.critic, float(loaded.model.scale(about.from_, about.to)))


def _trained(side: Leg) -> Way:
    leg, loaded = side
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


async def _closed(parts: Parts, call: ComposeCall, legs: list[Leg], arrays: Arrays) -> Way:
    _check_ratios(legs, "analytic")
    if len(legs) > 2:
        raise Invalid(
            "a closed form sums over one bridge, and here are several: use the method marginal",
            param="method",
            code="no_closed_form",
        )
    await _check_comparable(parts.bridges, legs)
    critic = legs[0][1].model.critic
    if critic == "dot":
        message = "there is a closed form for the cosine and for the squared distance, not for inner products"
        raise Invalid(f"{message}: use the method marginal", param="method", code="no_closed_form")
    scales = _link(legs[0]).scale, _link(legs[1]).scale
    try:
        bridge = await _bridge(parts, call, legs, 0, arrays)
    except Invalid as error:
        if critic == "squared_distance" or error.code != "no_bank":
            raise
        return Closed(critic, scales, bridge=None, normal=None)
    if critic == "cosine":
        return Closed(critic, scales, bridge, normal=None)
    normal = await asyncio.to_thread(fit_normal, bridge.left, bridge.log_shares())
    return Closed(critic, scales, bridge, normal)


def _check_ratios(legs: list[Leg], method: str) -> None:
    if len(legs) == 1:
        message = f"{method} sums over what joins two legs, and there is one"
        raise Invalid(message, param="method", code="legs")
    for at, (leg, loaded) in enumerate(legs):
        if not loaded.model.gives_ratios(leg.from_, leg.to):
            message = f"{leg.from_} and {leg.to} were trained by regression, which gives no ratios to sum"
            raise Invalid(f"{message}: use the method direct", param=f"legs[{at}]", code="no_ratio")


async def _check_comparable(bridges: Bridges, legs: list[Leg]) -> None:
    for first, second in pairwise(legs):
        if not await bridges.comparable(first, second):
            message = f"the two models encode {first[0].to!r} differently, so their vectors cannot be compared"
            raise Invalid(f"{message}: use the method marginal", param="method", code="encoders_differ")


async def _bridge(parts: Parts, call: ComposeCall, legs: list[Leg], at: int, arrays: Arrays) -> Bridge:
    """Return the bridge between two legs: from the call's tensors, or from the models' banks."""
    first, second = legs[at : at + 2]
    names = f"bridge.{2 * at}", f"bridge.{2 * at + 1}"
    if call.bank and names[0] not in arrays:
        if f"bridge_weights.{at}" in arrays:
            raise Malformed("weights go with bridge items of the call")
        return Bridge(*await parts.bridges.between(first, second))
    z = [
        await vectors(parts.sets, call, arrays, name, loaded)
        for name, (_, loaded) in zip(names, (first, second), strict=True)
    ]
    if len(z[0]) != len(z[1]):
        raise Malformed(f"{names[0]} and {names[1]} hold the same items")
    weights = _weights(arrays.get(f"bridge_weights.{at}"), len(z[0]))

    def prepare() -> Bridge:
        with within_memory():
            left, right = (
                critics.prepare(loaded.model.critic, torch.tensor(each, device=parts.device))
                for each, (_, loaded) in zip(z, (first, second), strict=True)
            )
            return Bridge(left, right, None if weights is None else torch.tensor(weights, device=parts.device))

    return await asyncio.to_thread(prepare)


async def vectors(sets: Sets, call: ComposeCall, arrays: Arrays, name: str, loaded: Loaded) -> np.ndarray:
    """Return vectors of a call.

    Raises Malformed for a tensor that is none, Invalid for vectors that are not the model's.
    """
    found = arrays.get(name)
    if found is None or found.ndim != 2 or found.dtype != np.float32 or not len(found):
        raise Malformed(f"{name} is a matrix of float32 vectors")
    model = loaded.model
    if found.shape[1] != model.dimensions:
        dim = model.dimensions
        raise Invalid(f"{name} vectors have {found.shape[1]} values; the model's have {dim}", param=name)
    if name in call.sets:
        await sets.check(call.sets[name], found, model.critic, param=name)
    else:
        check_vectors(found, model.critic, param=name)
    return found


def _weights(weights: np.ndarray | None, num: int) -> np.ndarray | None:
    if weights is None:
        return None
    if weights.shape != (num,) or weights.dtype.kind != "f":
        raise Malformed("bridge weights have one number for each bridge item")
    if not np.isfinite(weights).all() or (weights < 0).any() or not (weights > 0).any():
        raise Invalid("a weight is not negative, and not every one is zero", param="bridge_weights")
    return weights.astype(np.float64)
