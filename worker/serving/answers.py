"""What a composition found, block of sources by block, and the answer that is written from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from service.contract.wire import ComposeAnswer
from worker.composition.estimators import TRUSTED_SAMPLE_SIZE
from worker.serving import ways
from worker.serving.ways import Closed, Compared, Health, Way

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from service.contract.wire import Arrays
    from worker.composition.search import Best


@final
@dataclass(frozen=True)
class Found:
    """What was found for a few sources; tensors of no meaning for a way are None."""

    best: Best
    is_ratio: bool
    standard_error: Float[Tensor, "source best"] | None = None
    bias: Float[Tensor, "source best"] | None = None
    sample_size: Float[Tensor, " source"] | None = None
    rank_agreement: Float[Tensor, " source"] | None = None


def write(
    way: Way, parts: Sequence[Found], health: Health, *, reason: str | None, flat: float
) -> tuple[dict[str, Any], Arrays]:
    """Write the document and the tensors of a `ComposeCall`.

    `flat`: the logarithm of the number of targets where no prior was given and all weigh alike; 0 with a prior, which
    sums to 1.
    """
    arrays: Arrays = {"index": _joined([part.best.index for part in parts]).astype(np.int32)}
    for name, values in (
        ("score", [part.best.rank for part in parts]),
        ("log_ratio", [part.best.score if part.is_ratio else None for part in parts]),
        ("standard_error", [part.standard_error for part in parts]),
        ("bias", [part.bias for part in parts]),
    ):
        known = [
            torch.full_like(part.best.score, math.nan) if value is None else value
            for value, part in zip(values, parts, strict=True)
        ]
        arrays[name] = _joined(known).astype(np.float32)
    normalisers = [
        part.best.log_normaliser - flat if part.is_ratio else part.best.log_normaliser * math.nan for part in parts
    ]
    arrays["log_normaliser"] = _joined(normalisers).astype(np.float32)
    sizes = _listed([part.sample_size for part in parts])
    agreements = _listed([part.rank_agreement for part in parts])
    health = _judge(way, health, sizes, arrays["bias"])
    document = ComposeAnswer(
        method=ways.method_of(way),
        reason=reason,
        bridge_size=min((len(z) for z, _ in ways.bridges_of(way)), default=None),
        effective_sample_size=sizes,
        bridge_resultant=health.resultant,
        direct_marginal_spearman=None if agreements is None else [number(each) for each in agreements],
        normalised=ways.is_normalised(way),
        value_trusted=health.trusted,
        warnings=ways.warnings(way, health),
    )
    return document.model_dump(mode="json"), arrays


def number(value: float) -> float | None:
    """Return a number that JSON has."""
    return value if math.isfinite(value) else None


def _judge(way: Way, health: Health, sizes: list[float] | None, bias: np.ndarray) -> Health:
    if isinstance(way, Closed):
        return replace(health, trusted=ways.is_closed_form_trusted(way, health))
    if sizes is None or isinstance(way, Compared):
        return health
    return replace(
        health,
        trusted=float(np.median(sizes)) >= TRUSTED_SAMPLE_SIZE,
        num_doubtful=sum(size < TRUSTED_SAMPLE_SIZE for size in sizes),
        bias=float(np.median(bias)),
    )


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).cpu().numpy()


def _listed(parts: Sequence[Tensor | None]) -> list[float] | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known).tolist() if len(known) == len(parts) else None
