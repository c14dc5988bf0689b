"""Sums over one bridge, or over several in turn: a -> b -> c -> d, where only neighbours were ever paired.

If every modality depends on the ones before it through its neighbour alone (Che & Eysenbach 2025, A1, link by link),

    p(d | a) / p(d) = E_b E_c [ r(a, b) r(b, c) r(c, d) ],   b ~ p(b), c ~ p(c) apart,   r(x, y) = p(x, y) / p(x) p(y).

What a source puts on the items of a bridge is carried over one link after the other, by matrix products of which no
operand is kept. A trained score gives log r but for an offset of either item. The offsets of a and d drop out of a
normalised sum; those of b and c do not, and are found from what r must fulfil: E_c r(b, c) = 1 for every b and
E_b r(b, c) = 1 for every c (`balance`). Between the source and the first bridge nothing is known about the other
sources, so there only the source's own offset is removed, and likewise at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from jaxtyping import Float
from torch import Tensor

from worker.composition.estimators import TRUSTED_SAMPLE_SIZE, Marginal, as_log_shares, weigh
from worker.composition.streaming import Link, Masses

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

ROUNDS: Final = 10  # of balancing; each is two passes over all scores between two bridges
TOLERANCE: Final = 1e-3  # nats


@final
@dataclass(frozen=True)
class Bridge:
    """The items over which two links are summed: row m of both sides is the same item, under each link's encoder.

    Vectors are prepared as their link's critic compares them. Without `weights` the items were drawn from p(b); with
    them from another distribution q, and a weight is p(b) / q(b) but for a factor (`estimators.as_log_shares`).
    """

    left: Float[Tensor, "bridge d1"]
    right: Float[Tensor, "bridge d2"]
    weights: Float[Tensor, " bridge"] | None = None

    def log_shares(self) -> Float[Tensor, " bridge"]:
        """Return the logs of the items' shares of p(b), float64.

        Raises ValueError for weights that are none.
        """
        return as_log_shares(len(self.left), self.weights, device=self.left.device)


@final
@dataclass(frozen=True)
class Offsets:
    """What to add to the scores of a link between two bridges, so that they are log-ratios: per item of either."""

    first: Float[Tensor, " bridge"]
    second: Float[Tensor, " next"]
    deviation: float  # the largest of log E_b r(b, c) that is left; log E_c r(b, c) is 0


@final
@dataclass(frozen=True)
class Chain:
    """Links with a bridge between each two; `offsets` are those of the links between two bridges (`balance`)."""

    links: Sequence[Link]
    bridges: Sequence[Bridge]
    offsets: Sequence[Offsets] = ()
    normalise: bool = True

    def start(self, z_source: Float[Tensor, "source dim"]) -> Float[Tensor, "source bridge"]:
        """Return the log of what each source puts on the first bridge, float64: p(b | source), if normalised."""
        log_mass = self.links[0].scores(z_source, self.bridges[0].left).double() + self.bridges[0].log_shares()
        return log_mass.log_softmax(1) if self.normalise else log_mass

    def leave(self, at: int, log_mass: Float[Tensor, "source bridge"]) -> Masses:
        """Make masses on a bridge ready to be carried to the next (`arrive`), or from the last one to the targets."""
        if at < len(self.offsets):
            log_mass = log_mass + self.offsets[at].first
        return Masses(log_mass, self.links[at + 1], self.bridges[at].right)

    def arrive(self, at: int, log_mass: Float[Tensor, "source bridge"]) -> Float[Tensor, "source bridge"]:
        """Finish masses on a bridge: what `log_products` of those that left the one before found for all its items."""
        log_mass = log_mass + self.bridges[at].log_shares()
        if at <= len(self.offsets):
            log_mass = log_mass + self.offsets[at - 1].second
        return log_mass.log_softmax(1) if self.normalise else log_mass

    def masses(self, z_source: Float[Tensor, "source dim"]) -> list[Float[Tensor, "source _"]]:
        """Return the log of what each source puts on each bridge in turn, float64."""
        found = [self.start(z_source)]
        for at in range(1, len(self.bridges)):
            found.append(self.arrive(at, self.leave(at - 1, found[-1]).log_products(self.bridges[at].left)))
        return found

    def weigh(self, masses: Sequence[Float[Tensor, "source _"]], z_target: Float[Tensor, "target dim"]) -> Marginal:
        """Return the log-ratios of a few targets, and how sure they are.

        Over several bridges, drawn apart, the variances add up (the first term of the two-sample expansion; the joint
        term, already in each of them, is counted once too often, so the error is on the safe side), and so do biases.
        The effective sample size is that of the worst bridge.
        """
        f = self.links[-1].scores(self.bridges[-1].right, z_target)
        stages: list[Marginal] = []
        for at in reversed(range(len(self.bridges))):
            log_share = self.bridges[at].log_shares()
            stages.append(weigh(masses[at], f, log_share, normalise=self.normalise, precise=False))
            if at:
                f = self._back(at, f, log_share)
        if len(stages) == 1:
            return stages[0]
        size = torch.stack([stage.effective_sample_size for stage in stages]).amin(0)
        return Marginal(
            log_ratio=stages[0].log_ratio,
            standard_error=torch.stack([stage.standard_error for stage in stages]).norm(dim=0),
            bias=torch.stack([stage.bias for stage in stages]).sum(0),
            effective_sample_size=size,
            trusted=size.median(1).values >= TRUSTED_SAMPLE_SIZE,
        )

    def _back(
        self, at: int, f: Float[Tensor, "bridge target"], log_share: Float[Tensor, " bridge"]
    ) -> Float[Tensor, "before target"]:
        """Carry the targets' scores from a bridge back to the one before it."""
        log_mass = f.T.double() + log_share
        offsets = self.offsets[at - 1] if at <= len(self.offsets) else None
        if offsets is not None:
            log_mass = log_mass + offsets.second
        back = Masses(log_mass, self.links[at], self.bridges[at].left).log_products(self.bridges[at - 1].right).T
        return back if offsets is None else back + offsets.first[:, None]


def balance(link: Link, first: Bridge, second: Bridge) -> Offsets:
    """Find the offsets of a link between two bridges: matrix scaling (Sinkhorn & Knopp 1967), in log space.

    Offsets that a score has already do not matter. The first bridge's items get E_c r(b, c) = 1 exactly.
    """
    steps = balancing(link, first, second, width=max(len(first.right), len(second.left)))
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def balancing(link: Link, first: Bridge, second: Bridge, *, width: int) -> Generator[None, None, Offsets]:
    """Do as `balance` does, and yield whenever the scores of another `width` items are done with."""
    shares = first.log_shares(), second.log_shares()
    row, column = torch.zeros_like(shares[0]), torch.zeros_like(shares[1])
    deviation = torch.inf
    for _ in range(ROUNDS):
        onward = Masses((shares[0] + row)[None], link, first.right)
        sums = yield from carry(onward, second.left, width=width)
        deviation = float((sums[0] + column)[shares[1] > -torch.inf].abs().max())
        if deviation <= TOLERANCE:
            break
        column = -sums[0]
        back = yield from carry(Masses((shares[1] + column)[None], link, second.left), first.right, width=width)
        row = -back[0]
    return Offsets(row, column, deviation)


def carry(
    masses: Masses, z: Float[Tensor, "target dim"], *, width: int
) -> Generator[None, None, Float[Tensor, "source target"]]:
    """Carry masses over their link, and yield whenever the scores of another `width` targets are done with."""
    parts: list[Tensor] = []
    for block in z.split(width):
        parts.append(masses.log_products(block))
        yield
    return torch.cat(parts, 1)


@final
class Ending:
    """The last step of a chain, from what sources put on its last bridge to any targets.

    Its values are those of `estimators.marginal`, or of `Chain.weigh`, which say how sure they are too.
    """

    def __init__(self, chain: Chain, log_mass: Float[Tensor, "source bridge"]) -> None:
        self.num_sources = len(log_mass)
        self._normalise = chain.normalise
        last = len(chain.bridges) - 1
        # The targets' own offsets, log E_b e^f, are one more row of the same product.
        shares = [chain.bridges[last].log_shares()[None]] if chain.normalise else []
        self._masses = chain.leave(last, torch.cat([log_mass, *shares]))

    def log_ratios(self, z_target: Float[Tensor, "target dim"]) -> Float[Tensor, "source target"]:
        """Return log p(target | source) - log p(target), nats, float64."""
        found = self._masses.log_products(z_target)
        return found[:-1] - found[-1] if self._normalise else found
