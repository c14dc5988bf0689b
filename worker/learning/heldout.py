"""What a training run says about itself beside its loss: a look at held-out data, and how low it could get at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from service.contract.recipe import pair_name
from worker.learning import losses, retrieval
from worker.learning.data import Dataset, Encoder, PairData, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int64
    from torch import Tensor

    from service.contract.recipe import Recipe

MAX_SAMPLES: Final = 1000


def final_metrics(encoder: Encoder, pairs: Sequence[PairData]) -> dict[str, float]:
    """Return `holdout_recall@1/a->b` for every pair that has held-out samples.

    Where several data sets join the same two modalities, the figures are the means over the data sets.
    """
    figures: dict[str, list[float]] = {}
    for pair in pairs:
        indices = draw(pair.dataset.samples, "holdout", MAX_SAMPLES, seed=0)
        if len(indices) < 2:
            continue
        z = [encoder(source, indices) for source in pair.sources]
        for source, target in ((0, 1), (1, 0)):
            partners = payload_classes(pair.dataset, pair.modalities[target], indices)
            recall, _ = retrieval.at_ks(
                retrieval.by_critic(encoder.model.critic, z[source], z[target]), partners, partners, [1]
            )
            direction = f"{pair.modalities[source]}->{pair.modalities[target]}"
            figures.setdefault(f"holdout_recall@1/{direction}", []).append(recall[1])
    return {name: sum(values) / len(values) for name, values in figures.items()}


def payload_classes(dataset: Dataset, modality: str, indices: Int64[np.ndarray, " item"]) -> Int64[Tensor, " item"]:
    """Give samples numbers: the same for the same payload, byte for byte."""
    return retrieval.classes([dataset.samples.digest(modality, index) for index in indices.tolist()])[0]


def loss_floors(recipe: Recipe, pairs: Sequence[PairData]) -> dict[str, float]:
    """Return the floor of each pair's loss, by the pair's name: that of the modality that repeats itself more.

    Where several data sets join the same two modalities, it is their mean by weight. A loss without a known floor is
    left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for config, pair in zip(recipe.pairs, pairs, strict=True):
        for_each = [
            losses.floor(recipe.loss_of(config), pair.batch_size, np.bincount(classes.numpy()))
            for classes in (payload_classes(pair.dataset, modality, pair.indices) for modality in pair.modalities)
        ]
        known = [least for least in for_each if least is not None]
        if known:
            found.setdefault(pair_name(*pair.modalities), []).append((max(known), config.weight))
    return {
        name: sum(least * weight for least, weight in each) / sum(weight for _, weight in each)
        for name, each in found.items()
    }
