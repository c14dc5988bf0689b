"""Compose: scores of every target for each source vector, the best of them, and how far to trust the numbers.

`Composer` answers source by source, so that the batcher can cut a large question into steps. Its estimators are those
of `worker.composition`; here is only which of them applies, and with which scales, offsets and priors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, assert_never, final

import numpy as np
import torch

from service.contract.wire import ComposeAnswer
from worker.composition.diagnostics import resultant, spearman
from worker.composition.estimators import TRUSTED_SAMPLE_SIZE, direct, marginal
from worker.learning import critics
from worker.serving.batcher import Entry
from worker.serving.encode import within_memory

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from service.contract.losses import Critic
    from service.contract.wire import Arrays

BLOCK_SCORES: Final = 1 << 24  # bridge by target scores that are held at once
PRODUCTS_PER_TOKEN: Final = 1 << 16  # puts a step of composition and a step of embedding on one scale
SCORES_PER_TOKEN: Final = 1 << 9  # bounds the memory of a step: (source, target + bridge) float64, a few times
LOG_PRIOR_FLOOR: Final = -1e4  # a prior of zero ranks last, and stays a number in JSON
CONCENTRATED: Final = 0.3


@final
@dataclass(frozen=True)
class Compared:
    """Vectors of a pair that was never trained to give ratios, in one space: a score, no ratio."""

    critic: Critic
    is_trained: bool  # by regression
    bridge: Tensor | None  # of the modality between them, for the diagnostics


@final
@dataclass(frozen=True)
class Trained:
    """A trained pair: scale * score + bias is a log-ratio up to an offset, which the bank gives."""

    critic: Critic
    scale: float
    bias: float  # 0 but for the sigmoid loss; the bank's offset holds it too
    bank: Tensor | None  # (bridge, dim), vectors of the target's modality


@final
@dataclass(frozen=True)
class Summed:
    """Two trained legs, summed over a bridge; row m of both bridges is the same item."""

    critics: tuple[Critic, Critic]
    scales: tuple[float, float]  # biases would cancel: the offsets of both legs are removed
    bridges: tuple[Tensor, Tensor]  # (bridge, d1), (bridge, d2)
    comparable: bool  # source and target lie in one space, so that direct means something too


Way = Compared | Trained | Summed


@final
@dataclass(frozen=True)
class Scored:
    """A step's sources against all targets."""

    score: Float[Tensor, "source target"]  # what ranks, but for the prior
    log_ratio: Float[Tensor, "source target"] | None
    standard_error: Float[Tensor, "source target"] | None
    sample_size: Float[Tensor, " source"] | None
    rank_agreement: Float[Tensor, " source"] | None


@final
@dataclass(frozen=True)
class Row:
    """The answer for one source."""

    best: np.ndarray  # (4, k): index, score, log_ratio, standard_error; float64 holds every index
    log_normaliser: float
    sample_size: float | None
    rank_agreement: float | None


@final
class Composer:
    """One question: its vectors, its way, and what it answers. `run` belongs to the engine thread."""

    def __init__(
        self,
        way: Way,
        source: np.ndarray,
        target: np.ndarray,
        *,
        log_prior: np.ndarray | None,
        top_k: int,
        device: torch.device,
    ) -> None:
        self.way = way
        self.device = device
        self.top_k = min(top_k, len(target))
        self._source, self._target, self._log_prior = source, target, log_prior
        self._on_device: tuple[Tensor, Tensor, Tensor] | None = None
        self._f_target: Tensor | None = None
        self._resultant: float | None = None

    def entries(self) -> list[Entry]:
        """Return the sources as the batcher's items, each with what it costs in arithmetic and in memory."""
        num, dim = self._target.shape
        num_scores, num_products = num, num * dim
        match self.way:
            case Compared():
                pass
            case Trained(bank=bank):
                num_bridge = 0 if bank is None else len(bank)
                num_scores, num_products = num + num_bridge, num_products + num_bridge * dim
            case Summed(bridges=bridges):
                num_bridge = len(bridges[0])
                num_scores, num_products = num + num_bridge, num_products + num_bridge * (dim + num)
            case _:
                assert_never(self.way)
        length = max(1, num_products // PRODUCTS_PER_TOKEN, num_scores // SCORES_PER_TOKEN)
        return [Entry(at, length) for at in range(len(self._source))]

    @torch.inference_mode()
    @within_memory()
    def run(self, sources: Sequence[int]) -> list[Row]:
        """Answer for some sources.

        Raises Unavailable if the device has not the memory for it.
        """
        z_sources, z_target, log_prior = self._prepare()
        scored = self._score(z_sources[torch.tensor(sources, device=self.device)], z_target)
        ranking = scored.score + log_prior.clamp(min=LOG_PRIOR_FLOOR)
        best = ranking.topk(self.top_k, dim=1)
        nothing = torch.full_like(best.values, math.nan)
        columns = [
            best.indices.double(),
            best.values if self._log_prior is not None else scored.score.gather(1, best.indices),
            nothing if scored.log_ratio is None else scored.log_ratio.gather(1, best.indices),
            nothing if scored.standard_error is None else scored.standard_error.gather(1, best.indices),
        ]
        table = torch.stack([column.double() for column in columns], dim=1).cpu().numpy()  # (source, 4, k)
        if scored.log_ratio is None:
            log_normaliser = [math.nan] * len(sources)
        else:
            log_normaliser = torch.logsumexp(scored.log_ratio + log_prior, 1).tolist()
        sizes = [None] * len(sources) if scored.sample_size is None else scored.sample_size.tolist()
        agreements = [None] * len(sources) if scored.rank_agreement is None else scored.rank_agreement.tolist()
        return [Row(*each) for each in zip(table, log_normaliser, sizes, agreements, strict=True)]

    def _prepare(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._on_device is None:
            num = len(self._target)
            flat = np.full(num, -math.log(num)) if self._log_prior is None else self._log_prior
            z_source, z_target = (
                critics.prepare(critic, torch.tensor(z, device=self.device))
                for critic, z in zip(_critics(self.way), (self._source, self._target), strict=True)
            )
            log_prior = torch.tensor(flat, device=self.device, dtype=torch.float64)
            self._on_device = z_source, z_target, log_prior
            # Here, since `answer` belongs to the event loop, where nobody computes.
            self._resultant = (
                None if (bridge := self._bridge()) is None else resultant(critics.prepare("cosine", bridge))
            )
        return self._on_device

    def _score(self, z_source: Float[Tensor, "source d1"], z_target: Float[Tensor, "target d2"]) -> Scored:
        match self.way:
            case Compared(critic=critic):
                return Scored(direct(critic, z_source, z_target).double(), None, None, None, None)
            case Trained() as way:
                return _score_trained(way, z_source, z_target)
            case Summed() as way:
                return self._sum(way, z_source, z_target)
            case _:
                assert_never(self.way)

    def _sum(self, way: Summed, z_source: Float[Tensor, "source d1"], z_target: Float[Tensor, "target d2"]) -> Scored:
        f_source = way.scales[0] * critics.scores(way.critics[0], z_source, way.bridges[0])
        num_bridge = len(way.bridges[1])
        if self._f_target is None and num_bridge * len(z_target) <= BLOCK_SCORES:
            self._f_target = way.scales[1] * critics.scores(way.critics[1], way.bridges[1], z_target)
        blocks: list[tuple[Tensor, Tensor, Tensor]] = []
        width = max(1, BLOCK_SCORES // num_bridge)
        for begin in range(0, len(z_target), width):
            f_target = self._f_target
            if f_target is None:
                z = z_target[begin : begin + width]
                f_target = way.scales[1] * critics.scores(way.critics[1], way.bridges[1], z)
            found = marginal(f_source, f_target, normalise=True)
            blocks.append((found.log_ratio, found.standard_error, found.effective_sample_size))
        log_ratio, standard_error, sizes = (torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))
        agreement = spearman(direct(way.critics[0], z_source, z_target), log_ratio) if way.comparable else None
        return Scored(log_ratio, log_ratio, standard_error, sizes.median(1).values, agreement)

    def answer(self, rows: Sequence[Row]) -> tuple[dict[str, Any], Arrays]:
        """Write the document and the tensors of a `ComposeCall`."""
        table = np.stack([row.best for row in rows])
        arrays: Arrays = {"index": table[:, 0].astype(np.int32)}
        for at, name in enumerate(("score", "log_ratio", "standard_error"), start=1):
            arrays[name] = table[:, at].astype(np.float32)
        arrays["log_normaliser"] = np.array([row.log_normaliser for row in rows], np.float32)
        sizes = [row.sample_size for row in rows if row.sample_size is not None]
        agreements = [_number(row.rank_agreement) for row in rows]
        trusted = bool(sizes) and float(np.median(sizes)) >= TRUSTED_SAMPLE_SIZE
        bridge = self._bridge()
        document = ComposeAnswer(
            bridge_size=None if bridge is None else len(bridge),
            effective_sample_size=sizes or None,
            bridge_resultant=self._resultant,
            direct_marginal_spearman=agreements if any(each is not None for each in agreements) else None,
            normalised=isinstance(self.way, Summed) or (isinstance(self.way, Trained) and bridge is not None),
            value_trusted=trusted,
            warnings=_warnings(self.way, self._resultant, trusted=trusted),
        )
        return document.model_dump(mode="json"), arrays

    def _bridge(self) -> Tensor | None:
        match self.way:
            case Compared(bridge=bridge):
                return bridge
            case Trained(bank=bank):
                return bank
            case Summed(bridges=bridges):
                return bridges[0]
            case _:
                assert_never(self.way)


def _critics(way: Way) -> tuple[Critic, Critic]:
    match way:
        case Compared(critic=critic) | Trained(critic=critic):
            return critic, critic
        case Summed():
            return way.critics
        case _:
            assert_never(way)


def _score_trained(
    way: Trained, z_source: Float[Tensor, "source dim"], z_target: Float[Tensor, "target dim"]
) -> Scored:
    """Remove each source's offset, log mean e^f over the bank, from its scores (Che & Eysenbach 2025, A2)."""
    bank = way.bank
    f = way.scale * critics.scores(way.critic, z_source, z_target).double() + way.bias
    if bank is None:
        return Scored(f, f, None, None, None)
    f_bank = way.scale * critics.scores(way.critic, z_source, bank).double() + way.bias  # (source, bridge)
    log_sum = torch.logsumexp(f_bank, 1)
    size = (2 * log_sum - torch.logsumexp(2 * f_bank, 1)).exp().clamp(1.0, float(len(bank)))
    log_ratio = f - (log_sum - math.log(len(bank)))[:, None]
    standard_error = (1 / size - 1 / len(bank)).clamp(min=0).sqrt()
    return Scored(log_ratio, log_ratio, standard_error[:, None].expand_as(f), size, None)


def _warnings(way: Way, length: float | None, *, trusted: bool) -> list[str]:
    match way:
        case Compared(is_trained=True):
            found = ["this pair was trained by regression: comparing vectors ranks, but gives no ratio"]
        case Compared(critic=critic):
            found = ["this pair was never trained: comparing vectors ranks, but gives no ratio"]
            if critic == "dot":
                found.append("inner products of vectors of different lengths rank badly across a bridge: use marginal")
            elif critic == "cosine" and length is not None and length > CONCENTRATED:
                found.append(f"the bridge is concentrated (mean vector of length {length:.2f}): marginal ranks better")
        case Trained(bank=None):
            found = ["the model keeps no bank: the offset of each source is not removed from its log-ratios"]
        case Trained():
            found = [] if trusted else ["the effective sample size of the bank is small: offsets are uncertain"]
        case Summed():
            found = [] if trusted else ["the effective sample size is below 10: trust the order, not the numbers"]
        case _:
            assert_never(way)
    return found


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
