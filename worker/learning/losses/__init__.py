"""Losses: what a pair of modalities is trained with. They see neither towers nor batches of data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.contract.losses import InfoNCE, KSample, Loss, Scaled, Sigmoid, Square
from worker.learning import critics
from worker.learning.losses import contrast, floors


@final
@dataclass(frozen=True)
class Gathered:
    """The whole batch where several processes share it: the vectors of all, this process's own from row `offset` on."""

    z_a: Float[Tensor, "all dim"]
    z_b: Float[Tensor, "all dim"]
    offset: int


def compute(
    config: Loss,
    z_a: Float[Tensor, "batch dim"],
    z_b: Float[Tensor, "batch dim"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""] | None = None,
    *,
    gathered: Gathered | None = None,
) -> Float[Tensor, ""]:
    """Compute the loss of a batch, row i of both sides being one pair; the sigmoid's alone takes a bias.

    Logits are float32 (float64 for float64 vectors) also inside autocast. With `gathered` the mean over the processes
    of what each returns is the loss of the whole batch, and so are the gradients if those of gathered vectors are
    summed over the processes and those of parameters averaged.
    """
    if z_a.dtype in (torch.float16, torch.bfloat16):
        z_a, z_b = z_a.float(), z_b.float()
    with torch.autocast(z_a.device.type, enabled=False):
        loss = _contrast(config, z_a, z_b, scale, bias, gathered)
        if isinstance(config, Scaled) and config.attract:
            loss = loss - config.attract * critics.paired_scores(config.critic, z_a, z_b).mean()
        return loss


def _contrast(  # noqa: PLR0917 - what compute takes
    config: Loss, z_a: Tensor, z_b: Tensor, scale: Tensor, bias: Tensor | None, gathered: Gathered | None
) -> Float[Tensor, ""]:
    match config:
        case InfoNCE(critic=critic):
            if gathered is None:
                return contrast.info_nce(critic, z_a, z_b, scale)
            forth = contrast.one_sided_info_nce(critic, z_a, gathered.z_b, scale, offset=gathered.offset)
            back = contrast.one_sided_info_nce(critic, z_b, gathered.z_a, scale, offset=gathered.offset)
            return (forth + back) / 2
        case KSample(critic=critic, candidates=candidates):
            every_a, every_b = (z_a, z_b) if gathered is None else (gathered.z_a, gathered.z_b)
            return contrast.k_sample(critic, every_a, every_b, scale, candidates)  # small: every process computes all
        case Sigmoid(critic=critic):
            assert bias is not None, "the sigmoid loss has a bias"
            if gathered is None:
                return contrast.sigmoid(critic, z_a, z_b, scale, bias)
            return contrast.sigmoid(critic, z_a, gathered.z_b, scale, bias, offset=gathered.offset)
        case Square():
            return contrast.square(z_a, z_b)
        case _:
            assert_never(config)


def floor(config: Loss, batch_size: int, counts: Int[np.ndarray, " value"]) -> float | None:
    """Compute the least that the loss can be; None where there is no bound, or it is not known.

    `counts` says how often each distinct payload of one modality occurs in the data. Pairs that share a payload cannot
    be told apart, so no model is below it.
    """
    match config:
        case InfoNCE():
            least = floors.softmax(batch_size - 1, counts)
        case KSample(candidates=candidates):
            least = 2 * floors.softmax(candidates - 1, counts)
        case Sigmoid():
            least = floors.sigmoid(batch_size - 1, counts)
        case Square():
            return None
        case _:
            assert_never(config)
    if not config.attract:
        return least
    match config.critic:
        case "cosine":
            return least - config.attract
        case "squared_distance":
            return least
        case "dot":
            return None  # vectors can grow without end
        case _:
            assert_never(config.critic)
