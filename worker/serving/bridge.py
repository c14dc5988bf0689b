"""The bridge of a composition: vectors of the same items under the model of each leg, from the models' banks.

Legs of one model take the vectors as the banks hold them. Legs of two models embed the union of their banks' items,
each with its own encoder; that goes through the batcher like any other work, and the result is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, final

import numpy as np
import torch

from service.contract.errors import Invalid
from service.contract.recipe import pair_name
from worker.serving.batcher import Batcher, Entry, Ticket
from worker.serving.encode import encode
from worker.serving.known import Known, Memory
from worker.serving.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.contract.wire import ComposeLeg
    from worker.composition.chains import Offsets
    from worker.learning.model import Bank, Loaded
    from worker.learning.ragged import Ragged
    from worker.serving.residency import Residency

KEPT: Final = 8  # bridges between different models
KEPT_ANSWERS: Final = 1024
JOINED_BYTES: Final = 128 << 20  # of banks of one model that were put end to end
EMBEDDING_S: Final = 3600.0  # a bridge is embedded once for everybody, not within one caller's deadline
GIVE_THROUGH: Final = "give the bridge items with `through`"

Side = tuple["ComposeLeg", "Loaded"]
Bridge = tuple[torch.Tensor, torch.Tensor]  # (bridge, d1), (bridge, d2)


@final
class Bridges:
    """Finds bridges, and keeps those that had to be embedded."""

    def __init__(self, residency: Residency, batcher: Batcher, *, device: torch.device) -> None:
        self._residency = residency
        self._batcher = batcher
        self._device = device
        self._kept: OrderedDict[tuple[str, ...], asyncio.Task[Bridge]] = OrderedDict()
        self._comparable: dict[tuple[str, str, str], bool] = {}  # digests and modality -> the answer, which stays
        self._offsets: dict[str, Sequence[Offsets]] = {}
        self._joined: Recent[torch.Tensor] = Recent(JOINED_BYTES)
        self._memory = Memory()

    async def between(self, first: Side, second: Side) -> Bridge:
        """Return the bridge vectors under the model of each of two legs.

        Raises Invalid if the banks cannot give any.
        """
        banks = (_bank(first), _bank(second))
        modality = first[0].to
        if first[0].model.digest == second[0].model.digest:
            # A trained pair walked there and back has one bank, not two.
            if banks[0] is banks[1]:
                z = banks[0].vectors[modality]
            else:
                pairs = [pair_name(leg.from_, leg.to) for leg, _ in (first, second)]
                z = self._join((first[0].model.digest, *pairs, modality), [bank.vectors[modality] for bank in banks])
            return z, z
        self._check_same_tokens(first, second)
        if any(modality not in bank.items for bank in banks):
            message = "these legs are of two models, and not both keep the items of their bank"
            raise Invalid(f"{message}: {GIVE_THROUGH}", param="through", code="no_bank_items")
        return await self._embedded(first, second, banks)

    async def comparable(self, first: Side, second: Side) -> bool:
        """Tell whether two legs encode the modality in which they meet alike: then their vectors can be compared."""
        (leg, one), (other, two) = first, second
        if one is two:
            return True
        key = (leg.model.digest, other.model.digest, leg.to)
        if (known := self._comparable.get(key)) is None:
            # In a thread: every weight of a tower is looked at.
            known = await asyncio.to_thread(_same_encoder, one, two, leg.to)
            if len(self._comparable) >= KEPT_ANSWERS:
                self._comparable.clear()
            self._comparable[key] = known
        return known

    def offsets_of(self, path: str | None) -> Sequence[Offsets]:
        """Return the offsets of the links between bridges on a path over banks, if they were found before."""
        return () if path is None else self._offsets.get(path, ())

    def keep_offsets(self, path: str | None, offsets: Sequence[Offsets]) -> None:
        """Keep what took passes over all scores between two bridges."""
        if path is not None:
            if len(self._offsets) >= KEPT:
                self._offsets.pop(next(iter(self._offsets)))
            self._offsets[path] = offsets

    def known(self, path: str | None, target: str | None) -> Known | None:
        """Return what is kept of a path over banks and of the artifact of the set at its end."""
        return None if path is None else Known(self._memory, path, target)

    def _join(self, key: tuple[str, ...], vectors: list[torch.Tensor]) -> torch.Tensor:
        """Put two banks end to end, once for many questions."""
        z = self._joined.get(key)
        if z is None:
            z = torch.cat(vectors)
            self._joined.put(key, z, z.nbytes)
        return z

    def _check_same_tokens(self, first: Side, second: Side) -> None:
        modality = first[0].to
        path = f"tokenizers/{modality}.json"
        configs = [loaded.recipe.towers[modality].tokens for _, loaded in (first, second)]
        files = [self._residency.file_digest(leg.model.artifact, path) for leg, _ in (first, second)]
        if configs[0] != configs[1] or files[0] != files[1]:
            message = f"the two models tokenise {modality!r} differently"
            raise Invalid(f"{message}: {GIVE_THROUGH}", param="through", code="tokenisers_differ")

    async def _embedded(self, first: Side, second: Side, banks: tuple[Bank, Bank]) -> Bridge:
        modality = first[0].to
        pairs = [pair_name(leg.from_, leg.to) for leg, _ in (first, second)]
        key = (first[0].model.digest, second[0].model.digest, *pairs, modality)
        task = self._kept.get(key)
        if task is None:
            task = asyncio.create_task(self._embed(first, second, [bank.items[modality] for bank in banks]))
            self._kept[key] = task
            task.add_done_callback(lambda done: self._settle(key, done))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return await asyncio.shield(task)

    def _settle(self, key: tuple[str, ...], task: asyncio.Task[Bridge]) -> None:
        if (task.cancelled() or task.exception() is not None) and self._kept.get(key) is task:
            del self._kept[key]

    async def _embed(self, first: Side, second: Side, items: list[Ragged]) -> Bridge:
        halves: list[list[torch.Tensor]] = []
        for leg, loaded in (first, second):
            found = [await self._encode(leg.model.artifact, loaded, first[0].to, ragged) for ragged in items]
            halves.append(found)
        return torch.cat(halves[0]), torch.cat(halves[1])

    async def _encode(self, artifact: str, loaded: Loaded, modality: str, items: Ragged) -> torch.Tensor:
        owners = torch.arange(len(items.lengths)) if items.owners is None else items.owners
        lengths = items.lengths.numpy()
        longest = np.zeros(items.num_items, np.int64)
        np.maximum.at(longest, owners.numpy(), lengths)
        counts = np.bincount(owners.numpy())
        ticket = Ticket(
            group=("bridge", artifact, modality, id(items)),
            pace=(artifact, modality),
            run=lambda chosen: list(encode(loaded, modality, self._device, items.take(chosen))),
            entries=[Entry(at, int(longest[at]), int(counts[at])) for at in range(items.num_items)],
            deadline=time.monotonic() + EMBEDDING_S,
        )
        return torch.stack(await self._batcher.submit(ticket))


def _same_encoder(first: Loaded, second: Loaded, modality: str) -> bool:
    if first.model.critic != second.model.critic:
        return False
    one, two = (loaded.model.towers[modality].state_dict() for loaded in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _bank(side: Side) -> Bank:
    leg, loaded = side
    bank = loaded.banks.get(pair_name(leg.from_, leg.to))
    if bank is None or leg.to not in bank.vectors or leg.from_ not in bank.vectors:
        message = f"the model keeps no bank for {leg.from_} and {leg.to}"
        raise Invalid(f"{message}: {GIVE_THROUGH}", param="through", code="no_bank")
    return bank
