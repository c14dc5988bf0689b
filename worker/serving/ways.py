"""The ways to answer a composition, as a call's legs and method settle them, and when each is to be doubted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, assert_never, final

import torch

from worker.composition.chains import Bridge, Chain
from worker.composition.choice import CONCENTRATED
from worker.composition.closed_forms import Normal, gaussian, sphere
from worker.composition.estimators import TRUSTED_SAMPLE_SIZE
from worker.composition.streaming import Link
from worker.learning import critics

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

    from service.contract.losses import Critic
    from service.contract.wire import Method

EVEN: Final = 0.1  # length of the mean bridge vector up to which the closed form's values, not only its order, hold
NORMAL: Final = 0.5  # excess kurtosis along the axes up to which a bridge passes for normal
BIASED: Final = 0.1  # nats
UNBALANCED: Final = 0.1  # nats
PROBED: Final = 1 << 14  # bridge items over which a closed form is held against the sum
PROBED_SOURCES: Final = 16
PROBED_TARGETS: Final = 64
FEW_SHARES: Final = 0.1  # of a bridge: effective number of its items by their weights alone


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
    """Trained legs, summed over a bridge between each two; biases would cancel, since offsets are removed."""

    chain: Chain
    comparable: bool  # source and target lie in one space, so that direct means something too
    is_open: bool = False  # the call leaves it to the sum's health whether vectors are compared instead


@final
@dataclass(frozen=True)
class Closed:
    """Two trained legs of one space, summed in closed form: over the sphere, or over a normal distribution."""

    critic: Critic
    scales: tuple[float, float]
    bridge: Bridge | None  # where it really lies; None: nothing tells
    normal: Normal | None  # of the bridge, for the squared distance


Way = Compared | Trained | Summed | Closed


@final
@dataclass(frozen=True)
class Health:
    """What was seen of the bridges while a question was answered."""

    resultant: float | None = None  # the largest
    kurtosis: float | None = None
    num_shares: float | None = None  # effective part of a bridge by its weights alone, the smallest
    deviation: float = 0.0
    bias: float | None = None  # median of the matches
    apart: float | None = None  # nats between a closed form and the sum, beyond the error of that
    num_doubtful: int = 0  # sources whose own sample size is too small
    trusted: bool = False


def method_of(way: Way) -> Method:
    """Name the method of a way."""
    match way:
        case Compared() | Trained():
            return "direct"
        case Summed():
            return "marginal"
        case Closed():
            return "analytic"
        case _:
            assert_never(way)


def critics_of(way: Way) -> tuple[Critic, Critic]:
    """Return the critics that sources and targets are prepared for."""
    match way:
        case Compared(critic=critic) | Trained(critic=critic) | Closed(critic=critic):
            return critic, critic
        case Summed(chain=chain):
            return chain.links[0].critic, chain.links[-1].critic
        case _:
            assert_never(way)


def bridges_of(way: Way) -> list[tuple[Tensor, Tensor | None]]:
    """Return the vectors of the bridges, if any, each with its weights."""
    match way:
        case Compared(bridge=z) | Trained(bank=z):
            return [] if z is None else [(z, None)]
        case Summed(chain=chain):
            return [(bridge.left, bridge.weights) for bridge in chain.bridges]
        case Closed(bridge=bridge):
            return [] if bridge is None else [(bridge.left, bridge.weights)]
        case _:
            assert_never(way)


def is_normalised(way: Way) -> bool:
    """Tell whether the offsets are removed."""
    return isinstance(way, Summed | Closed) or (isinstance(way, Trained) and way.bank is not None)


def in_closed_form(
    way: Closed, z_source: Float[Tensor, "source dim"], z_target: Float[Tensor, "target dim"]
) -> Float[Tensor, "source target"]:
    """Return the log-ratios, offsets removed."""
    if way.normal is None:
        return sphere(z_source, z_target, way.scales, normalise=True)
    return gaussian(z_source, z_target, way.scales, way.normal, normalise=True)


def look_at(way: Way) -> Health:
    """Look at where the bridges lie."""
    resultants: list[float] = []
    shares: list[float] = []
    for z, weights in bridges_of(way):
        unit = critics.prepare("cosine", z).double()
        w = torch.full_like(unit[:, 0], 1 / len(unit)) if weights is None else weights.double() / weights.double().sum()
        resultants.append(float((w @ unit).norm()))
        shares.append(1 / (float(w.square().sum()) * len(w)))
    kurtosis = None
    if isinstance(way, Closed) and way.normal is not None and way.bridge is not None:
        along = (way.bridge.left.double() - way.normal.mean) @ way.normal.axes
        wide = way.normal.variances > 1e-6 * way.normal.variances.amax()
        fourth = along[:, wide].pow(4).mean(0) / way.normal.variances[wide].square()
        kurtosis = float((fourth - 3).mean())
    return Health(resultant=max(resultants, default=None), kurtosis=kurtosis, num_shares=min(shares, default=None))


def spread(num: int, most: int, device: torch.device) -> Int64[Tensor, " row"]:
    """Return some rows of many, evenly spread."""
    return torch.linspace(0, num - 1, min(num, most), dtype=torch.float64, device=device).round().long()


def apart_from_sum(
    way: Closed, z_source: Float[Tensor, "source dim"], z_target: Float[Tensor, "target dim"]
) -> float | None:
    """Hold the closed form against the sum over the bridge for a few sources and targets.

    Return the median difference, less two standard errors, nats; None if there is no bridge, or if it does not carry
    the sum.
    """
    if way.bridge is None:
        return None
    rows = spread(len(way.bridge.left), PROBED, z_source.device)
    weights = None if way.bridge.weights is None else way.bridge.weights[rows]
    if weights is not None and not bool(weights.any()):
        return None
    bridge = Bridge(way.bridge.left[rows], way.bridge.right[rows], weights)
    chain = Chain([Link(way.critic, scale) for scale in way.scales], [bridge])
    few = z_source[:PROBED_SOURCES]
    seen = chain.weigh(chain.masses(few), z_target)
    if float(seen.effective_sample_size.median()) < TRUSTED_SAMPLE_SIZE:
        return None
    difference = (in_closed_form(way, few, z_target) - seen.log_ratio).abs()
    return max(0.0, float(difference.median()) - 2 * float(seen.standard_error.median()))


def is_closed_form_trusted(way: Closed, health: Health) -> bool:
    """Tell whether the bridge has the shape that the closed form takes for granted, and sums over it agree."""
    return _has_its_shape(way, health) and (health.apart is None or health.apart <= BIASED)


def _has_its_shape(way: Closed, health: Health) -> bool:
    if way.normal is None:
        return health.resultant is not None and health.resultant <= EVEN
    return health.kurtosis is not None and abs(health.kurtosis) <= NORMAL


def warnings(way: Way, health: Health) -> list[str]:
    """Say what is to be doubted, and what would help."""
    found = _warnings(way, health)
    if health.num_shares is not None and health.num_shares < FEW_SHARES:
        share = f"{health.num_shares:.1%}"
        found.append(f"the bridge's weights are uneven: it counts as {share} of its items, so another sample helps")
    return found


def _warnings(way: Way, health: Health) -> list[str]:
    length = health.resultant
    match way:
        case Compared(is_trained=True):
            return ["this pair was trained by regression: comparing vectors ranks, but gives no ratio"]
        case Compared(critic=critic):
            found = ["this pair was never trained: comparing vectors ranks, but gives no ratio"]
            if critic == "dot":
                found.append("inner products of vectors of different lengths rank badly across a bridge: use marginal")
            elif critic == "cosine" and length is not None and length > CONCENTRATED:
                found.append(f"the bridge is concentrated (mean vector of length {length:.2f}): marginal ranks better")
            return found
        case Trained(bank=None):
            return ["the model keeps no bank: the offset of each source is not removed from its log-ratios"]
        case Trained():
            small = ["the effective sample size of the bank is small: offsets are uncertain"]
            return [] if health.trusted else small
        case Summed(chain=chain):
            return _warnings_of_sum(health, num_bridges=len(chain.bridges))
        case Closed():
            return _warnings_of_closed_form(way, health)
        case _:
            assert_never(way)


def _warnings_of_sum(health: Health, *, num_bridges: int) -> list[str]:
    found: list[str] = []
    if not health.trusted:
        found.append("the effective sample size is below 10: trust the order, not the numbers")
    elif health.num_doubtful:
        found.append(f"for {health.num_doubtful} sources the effective sample size is below 10: trust their order only")
    if health.bias is not None and abs(health.bias) > BIASED:
        found.append(f"the log-ratios are biased by about {health.bias:+.2f} nats: a larger bridge lowers that")
    if num_bridges > 1 and health.deviation > UNBALANCED:
        left = f"{health.deviation:.2f} nats"
        found.append(f"the scores between two bridges could not be balanced ({left} are left): numbers are uncertain")
    return found


def _warnings_of_closed_form(way: Closed, health: Health) -> list[str]:
    if health.trusted:
        return []
    if health.apart is not None and _has_its_shape(way, health):
        return [f"sums over the bridge differ from the closed form by about {health.apart:.2f} nats: use marginal"]
    if way.normal is not None:
        value = "unknown" if health.kurtosis is None else f"{health.kurtosis:.1f}"
        return [f"the bridge is not normal (excess kurtosis {value}): trust the order, not the numbers"]
    if health.resultant is None:
        return ["nothing tells whether the bridge lies evenly on the sphere, which the closed form takes for granted"]
    uneven = f"the bridge does not lie evenly on the sphere (mean vector of length {health.resultant:.2f})"
    doubt = "marginal ranks better" if health.resultant > CONCENTRATED else "trust the order, not the numbers"
    return [f"{uneven}: {doubt}"]
