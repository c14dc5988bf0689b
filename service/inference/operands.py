"""Operands of a composition: items to embed, or embedding sets, which stay where they lie: the worker maps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from typing_extensions import TypeIs

from service import embedding_sets
from service.catalogue import Model
from service.contract.errors import Invalid, IsthmusError
from service.contract.items import AnyItem
from service.contract.joints import check_weights
from service.contract.operations import EmbeddingSetRef
from service.contract.wire import Arrays, SetRef
from service.deps import Service
from service.inference.inputs import Timings, Tokenised, embed, listed, places, tokenise
from service.inference.legs import Way, check_bank_bridge
from service.inference.line import as_arrays
from service.known_sets import Operand

Given = AnyItem | list[AnyItem] | EmbeddingSetRef
Bridge = Given | list[EmbeddingSetRef]
MAX_SENT_TOKENS: Final = 2048
"""Of items that travel with a question: more are embedded first, in calls that others can come between."""
MAX_BRIDGE_BYTES: Final = 512 << 20
"""Of one side of a bridge: it is held on the device while targets stream by."""


@dataclass(frozen=True)
class Reader:
    """Reads what a request gives, for whom, and where its time goes."""

    service: Service
    tenant: str
    timings: Timings
    truncate: bool

    async def read(
        self,
        model: Model,
        given: Given,
        name: str,
        *,
        hint: str | None,
        sum_hint: str | None = None,
        expected: str | None = None,
    ) -> Side:
        """Read one side of the question, and embed nothing yet: its modality decides the way.

        Raises Invalid for items of several modalities, or not of the expected one, and for vectors of another model.
        """
        if isinstance(given, EmbeddingSetRef):
            param = f"{name}.embeddings"
            operand = await self.service.sets.find(self.tenant, given.embeddings, param=param)
            embedding_sets.check(operand.about, model, expected, param=param)
            return Side(model, operand.about.modality, operand, name)
        if hint is not None:
            model.check_modality(hint, param=f"{name}_modality")
        items = listed(self.service, given, name)
        at = places(name, items, given)
        tokenised = await tokenise(
            self.service, model, items, at, self.timings, hint=hint, sum_hint=sum_hint, truncate=self.truncate
        )
        modality = expected or tokenised[0].modality
        for place, each in zip(at, tokenised, strict=True):
            if each.modality != modality:
                raise Invalid(f"this is {each.modality}, not {modality}: all are of one modality", param=place)
        return Side(model, modality, Items(tokenised, at), name)

    async def embed(self, side: Side, tensor: str, found: Tensors) -> None:
        """Put the vectors of a side among the tensors of a call; of a set, where they are."""
        if isinstance(side.given, Operand):
            found.sets[tensor] = SetRef(artifact=side.given.artifact)
            return
        encoded = await embed(self.service, side.model, side.given.tokenised, side.given.at, self.timings)
        found.arrays[tensor] = encoded.vectors

    def send(self, side: Side, tensor: str, found: Tensors) -> bool:
        """Put the tokens of a side among the tensors: the worker embeds them on the way, one call in place of two.

        False: there are too many, or some are vectors, sums or a set, which `embed` is for.
        """
        if isinstance(side.given, Operand) or side.num_tokens > MAX_SENT_TOKENS:
            return False
        items = side.given.tokenised
        if any(each.vector is not None or each.parts for each in items):
            return False
        arrays = as_arrays([each.sequences for each in items])
        found.arrays.update({f"{tensor}.{name}": array for name, array in arrays.items()})
        return True

    async def add_bridges(self, way: Way, found: Tensors) -> int:
        """Put the bridges that the request gives among the tensors, with their weights; count their tokens.

        Raises Invalid for a bridge that neither the request nor the banks give, and for weights that go with none.
        """
        num_tokens = 0
        for at, asked in enumerate(way.joints):
            if way.method == "direct":
                if asked.weights is not None:
                    message = "comparing vectors sums over no bridge that could be weighted"
                    raise Invalid(message, param=asked.weights_param)
                continue
            if asked.through is None or isinstance(asked.through, str):
                check_weights(asked, 0)
                check_bank_bridge(way, at)
                continue
            first, second = way.legs[at : at + 2]
            models = first.model, second.model
            sides = await self.add_bridge(models, first.to, asked.through, found, at=at, name=asked.param)
            check_weights(asked, len(sides[0]))
            num_tokens += sum(side.num_tokens for side in sides)
            if asked.weights is not None:
                found.arrays[f"bridge_weights.{at}"] = np.array(asked.weights, np.float64)
        return num_tokens

    async def add_bridge(
        self,
        models: tuple[Model, Model],
        modality: str,
        given: Bridge,
        found: Tensors,
        *,
        at: int = 0,
        name: str = "through",
    ) -> list[Side]:
        """Put the bridge after leg `at` that the request gives among the tensors, under the model of each leg.

        Return it as each model has it. Raises Invalid where the two legs would not have the same items.
        """
        is_one = models[0].ref.digest == models[1].ref.digest
        if isinstance(given, EmbeddingSetRef) or _are_sets(given):
            sides = await self._read_sets(models[:1] if is_one else models, modality, given, name)
        else:
            sides = [
                await self.read(model, given, name, hint=modality, expected=modality)
                for model in (models[:1] if is_one else models)
            ]
        for number, side in enumerate(sides, start=2 * at):
            await self.embed(side, f"bridge.{number}", found)
        if is_one:
            found.double(f"bridge.{2 * at}", f"bridge.{2 * at + 1}")
        return sides

    async def _read_sets(
        self, models: Sequence[Model], modality: str, given: EmbeddingSetRef | list[EmbeddingSetRef], param: str
    ) -> list[Side]:
        refs = given if isinstance(given, list) else [given]
        if len(refs) != len(models):
            one, two = "of one model, which share one set", "of two models: give the same samples under each, or items"
            message = f"{len(refs)} embedding sets for two legs {one if len(models) == 1 else two}"
            raise Invalid(message, param=param, code="bridge_sets")
        sides: list[Side] = []
        for at, (ref, model) in enumerate(zip(refs, models, strict=True)):
            name = f"{param}[{at}]" if isinstance(given, list) else param
            side = await self.read(model, ref, name, hint=None, expected=modality)
            assert isinstance(side.given, Operand)
            embedding_sets.check_size(side.given.about, MAX_BRIDGE_BYTES, param=f"{name}.embeddings")
            sides.append(side)
        operands = [side.given for side in sides if isinstance(side.given, Operand)]
        if len(operands) > 1:
            await embedding_sets.check_same_samples(self.service, operands)
        return sides


@dataclass(frozen=True)
class Items:
    """Items as a model reads them; `at` names their places in the request."""

    tokenised: list[Tokenised]
    at: list[str]


@dataclass(frozen=True)
class Side:
    """One end of the question, or the bridge: items, or an embedding set, all of one modality."""

    model: Model
    modality: str
    given: Items | Operand
    name: str

    @property
    def num_tokens(self) -> int:
        """Tokens that are read for it."""
        return sum(tokens.num_tokens for tokens in self.given.tokenised) if isinstance(self.given, Items) else 0

    def blamed(self, error: IsthmusError) -> IsthmusError:
        """Name the place of the item that an error of its embedding is about."""
        if error.item is not None and isinstance(self.given, Items) and error.item < len(self.given.at):
            error.param = self.given.at[error.item]
        return error

    def __len__(self) -> int:
        return len(self.given.tokenised) if isinstance(self.given, Items) else self.given.about.num_vectors


@dataclass(frozen=True)
class Tensors:
    """What a call carries: arrays to send, and sets that the worker maps."""

    arrays: Arrays = field(default_factory=Arrays)
    sets: dict[str, SetRef] = field(default_factory=dict[str, SetRef])

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.arrays or tensor in self.sets

    def double(self, tensor: str, other: str) -> None:
        """Give a tensor a second name."""
        if tensor in self.arrays:
            self.arrays[other] = self.arrays[tensor]
        else:
            self.sets[other] = self.sets[tensor]


def _are_sets(given: Bridge) -> TypeIs[list[EmbeddingSetRef]]:
    return isinstance(given, list) and isinstance(given[0], EmbeddingSetRef)
