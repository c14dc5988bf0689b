"""Look at a way from one modality to another before anybody takes it: do the assumptions hold, and which method to use.

Works on the banks that a model keeps. A few items of either bank stand for sources and targets; their partners are not
among the bridge items, since in a bank of a few thousand they would be there far too often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from service.contract.diagnostics import LegFigures, PairDiagnostics, SumFigures
from service.contract.recipe import pair_name
from worker.composition import normal, sphere
from worker.composition.choice import AGREEING, choose
from worker.composition.diagnostics import spearman
from worker.composition.estimators import TRUSTED_SAMPLE_SIZE, Marginal, direct, marginal
from worker.learning import critics

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from service.contract.diagnostics import Verdict
    from service.contract.losses import Critic
    from worker.learning.model import Bank, Loaded

SCORES: Final = 1 << 22  # of a matrix
MAX_PROBES: Final = 256
FEWEST_PROBES: Final = 32  # a rank correlation over fewer says nothing
MAX_SOURCES: Final = 64
FEWEST_SOURCES: Final = 4
TARGETS_AT_ONCE: Final = 8  # at least: what is the same for all targets is done again for each block of them
MAX_ITEMS: Final = 8192  # of a leg, where its offsets are measured
STEADY: Final = 0.3  # nats
UNSTEADY: Final = 1.0
HALF_AGREEING: Final = 0.8


@final
@dataclass(frozen=True)
class Leg:
    """A trained pair with its bank: row i of both sides is one item, prepared for the critic."""

    end: str
    scale: float
    z_end: Float[Tensor, "item dim"]
    z_bridge: Float[Tensor, "item dim"]


def bridges(model: Loaded, source: str, target: str) -> Iterator[tuple[str, Leg, Leg]]:
    """Yield each modality that was trained with both, by losses that give ratios, and whose banks the model keeps."""
    for through in sorted(model.recipe.towers):
        found = [_leg(model, model.banks, end, through) for end in (source, target)]
        if found[0] is not None and found[1] is not None:
            yield through, found[0], found[1]


def _leg(model: Loaded, banks: Mapping[str, Bank], end: str, through: str) -> Leg | None:
    if not model.model.gives_ratios(end, through):
        return None
    bank = banks.get(pair_name(end, through))
    if bank is None or not {end, through} <= bank.vectors.keys():
        return None
    scale = float(model.model.scale(end, through))
    return Leg(end, scale, bank.vectors[end], bank.vectors[through])  # which the model encoded: they are prepared


def cost(num_items: int, dim: int) -> int:
    """Return about how many multiplications `examine` takes for banks of so many items together."""
    return num_items * (dim + 6 * MAX_SOURCES) * MAX_PROBES + sphere.COMPARED_ITEMS**2 * dim


def examine(critic: Critic, first: Leg, second: Leg, *, seed: int = 0) -> PairDiagnostics:
    """Measure everything that two legs tell by themselves; the seed draws the items that stand for the ends."""
    generator = torch.Generator().manual_seed(seed)
    (probes, rest), (others, remaining) = (_split(len(leg.z_end), generator) for leg in (first, second))
    bridge = torch.cat([first.z_bridge[rest], second.z_bridge[remaining]])
    chosen = torch.randperm(len(bridge), generator=generator)[: sphere.MAX_ITEMS].to(bridge.device)
    seen = bridge[chosen]
    on_sphere = sphere.measure(seen, seed)
    sources = probes[: min(MAX_SOURCES, max(FEWEST_SOURCES, SCORES // len(bridge)))]
    found = _sum(critic, (first, second), bridge, first.z_end[sources], second.z_end[others])
    length = float(bridge.mean(0, dtype=torch.float64).norm()) if critic == "cosine" else on_sphere.resultant
    method, reason = choose(
        critic,
        comparable=True,
        resultant=length,
        sample_size=found.effective_sample_size,
        rank_agreement=found.rank_correlation,
    )
    return PairDiagnostics(
        bridge_size=len(bridge),
        method=method,
        reason=reason,
        first=_measure_leg(critic, first, probes, rest),
        second=_measure_leg(critic, second, others, remaining),
        sphere=None if critic == "squared_distance" else on_sphere,
        normal=None if critic == "cosine" or bool((seen == seen[0]).all()) else normal.measure(seen),
        sum=found,
    )


def judge_offsets(deviation: float) -> Verdict:
    """Judge how far E e^f varies, nats: it is constant where scores are log-ratios."""
    return "passes" if deviation < STEADY else "doubtful" if deviation < UNSTEADY else "fails"


def judge_agreement(rank_correlation: float | None) -> Verdict:
    """Judge whether comparing vectors says what summing over the bridge does."""
    if rank_correlation is None or rank_correlation < HALF_AGREEING:
        return "fails"
    return "passes" if rank_correlation >= AGREEING else "doubtful"


def offset_deviation(f: Float[Tensor, "item other"]) -> float:
    """Return the deviation over items of log Z = log mean over the others of e^f, nats."""
    log_z = f.double().logsumexp(1) - math.log(f.shape[1])
    return float(log_z.std()) if len(log_z) > 1 else 0.0


def _split(num: int, generator: torch.Generator) -> tuple[Int64[Tensor, " probe"], Int64[Tensor, " rest"]]:
    order = torch.randperm(num, generator=generator)
    probes = max(1, min(MAX_PROBES, max(FEWEST_PROBES, SCORES // num), num // 4))
    return order[:probes], order[probes:]


def _measure_leg(critic: Critic, leg: Leg, probes: Int64[Tensor, " probe"], rest: Int64[Tensor, " rest"]) -> LegFigures:
    rest = rest[:MAX_ITEMS]

    def deviation(z: Float[Tensor, "item dim"], others: Float[Tensor, "item dim"]) -> float:
        return offset_deviation(leg.scale * critics.scores(critic, z[probes], others[rest]))

    of_end, of_bridge = deviation(leg.z_end, leg.z_bridge), deviation(leg.z_bridge, leg.z_end)
    return LegFigures(
        end=leg.end,
        scale=leg.scale,
        end_offset_deviation=of_end,
        bridge_offset_deviation=of_bridge,
        verdict=judge_offsets(max(of_end, of_bridge)),
    )


def _sum(
    critic: Critic,
    legs: tuple[Leg, Leg],
    bridge: Float[Tensor, "bridge dim"],
    z_source: Float[Tensor, "source dim"],
    z_target: Float[Tensor, "target dim"],
) -> SumFigures:
    f_source = legs[0].scale * critics.scores(critic, z_source, bridge)
    parts: list[Marginal] = []
    for z in z_target.split(max(TARGETS_AT_ONCE, SCORES // len(bridge))):
        f_target = legs[1].scale * critics.scores(critic, bridge, z)
        parts.append(marginal(f_source, f_target, normalise=True, precise=False))
    summed = torch.cat([part.log_ratio for part in parts], 1)
    compared = direct(critic, z_source, z_target)
    sizes = torch.cat([part.effective_sample_size for part in parts], 1).median(1).values
    agreement = float(spearman(compared, summed).nanmedian())
    correlation = agreement if math.isfinite(agreement) else None
    return SumFigures(
        num_sources=len(z_source),
        num_targets=len(z_target),
        effective_sample_size=(size := float(sizes.median())),
        sample_size_verdict="passes" if size >= TRUSTED_SAMPLE_SIZE else "fails",
        rank_correlation=correlation,
        best_agreement=float((compared.argmax(1) == summed.argmax(1)).double().mean()),
        agreement_verdict=judge_agreement(correlation),
    )
