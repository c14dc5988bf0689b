"""The bridge bank: training items kept in the artifact, so that composition needs no data set.

Drawn after training, with the final weights and with replacement: a bank is a sample of p(b), in which a caption that
is frequent in the data is frequent too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from service.contract.recipe import Bank as BankConfig
from service.contract.recipe import Recipe, pair_name
from worker.learning.data import Encoder, PairData
from worker.learning.model import Bank
from worker.learning.ragged import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

BANK_STREAM: Final = 0xBA2C  # keeps these draws apart from the order of the batches


def draw_banks(encoder: Encoder, recipe: Recipe, pairs: Sequence[PairData]) -> dict[str, Bank]:
    """Draw the bank of every trained pair: its data sets by weight, their training samples evenly, un-augmented."""
    config = recipe.bank or BankConfig()
    if config.keep == "none":
        return {}
    banks: dict[str, Bank] = {}
    for at, name in enumerate(encoder.model.log_scales):
        members = [pair for pair in pairs if pair_name(*pair.modalities) == name]
        weights = np.array([pair.weight for pair in members])
        rng = np.random.default_rng([recipe.seed, BANK_STREAM, at])
        counts = rng.multinomial(config.size, weights / weights.sum()).tolist()
        chosen = [rng.choice(pair.indices, count) for pair, count in zip(members, counts, strict=True)]
        bank = Bank(vectors={})
        for modality in name.split("+"):
            parts = [
                (pair.sources[pair.modalities.index(modality)], *np.unique(indices, return_inverse=True))
                for pair, indices in zip(members, chosen, strict=True)
                if len(indices)
            ]  # each sample is encoded once, however often it was drawn
            bank.vectors[modality] = torch.cat(
                [encoder(source, distinct)[torch.from_numpy(back)] for source, distinct, back in parts]
            )
            if config.keep == "items":
                bank.items[modality] = join([source(distinct).take(back.tolist()) for source, distinct, back in parts])
        banks[name] = bank
    return banks


def join(parts: Sequence[Ragged]) -> Ragged:
    """Put the items of several batches end to end."""
    owners = None
    if any(part.owners is not None for part in parts):
        starts = np.cumsum([0, *(part.num_items for part in parts)]).tolist()
        owners = torch.cat(
            [
                start + (torch.arange(len(part.lengths)) if part.owners is None else part.owners)
                for start, part in zip(starts, parts, strict=False)
            ]
        )
    return Ragged(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]), owners)
