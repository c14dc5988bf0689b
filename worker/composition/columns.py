"""What targets are to the items of a bridge, kept for sources that are still to come.

To sum over a bridge anew means the product of all its items with all targets. Where the same targets are asked about
again and again that product need not be: what is left to do for a source is one pass over its exponentials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from worker.composition.estimators import ROUNDING, Marginal, gather, weigh_exponentials

if TYPE_CHECKING:
    from worker.composition.chains import Bridge
    from worker.composition.streaming import Link


@final
@dataclass(frozen=True)
class Look:
    """What sources have to do with all targets, as `estimators.Marginal`; sample sizes are of the probe alone."""

    log_ratio: Float[Tensor, "source target"]
    effective_sample_size: Float[Tensor, "source probe"]


@final
@dataclass(frozen=True)
class Placed:
    """What sources put on the places of a bridge, of which the largest on an item is 1, and the squares of that."""

    mass: Float[Tensor, "source place"]
    square: Float[Tensor, "source place"]
    peak: Float[Tensor, "source 1"]  # what that 1 was, as a logarithm


@final
class Columns:
    """Exponentials of the scores of targets with the items of a bridge, each target's less its highest."""

    def __init__(self, bridge: Bridge, probe: Int64[Tensor, " target"], *, num_targets: int, normalise: bool) -> None:
        """Make room; the targets come by `add`. The effective sample sizes will be those of the probe."""
        self._log_share = bridge.log_shares()
        self._normalise = normalise
        # A bank is drawn with replacement: what lies at one place is one column, whatever is put on it.
        self._z_bridge, self._place = torch.unique(bridge.right, dim=0, return_inverse=True)
        self._mass = bridge.right.new_empty(num_targets, len(self._z_bridge))
        self._peak = self._log_share.new_empty(num_targets)
        self._log_offset = torch.zeros_like(self._peak)
        self._probe = probe
        self._square = bridge.right.new_empty(len(probe), len(self._z_bridge))
        self._num = 0

    @property
    def num_bytes(self) -> int:
        """What it holds."""
        return self._mass.nbytes + self._square.nbytes + self._z_bridge.nbytes

    def add(self, link: Link, z_target: Float[Tensor, "target dim"]) -> None:
        """Take the next targets, over the bridge's link with them."""
        chosen = slice(self._num, self._num + len(z_target))
        f = link.scores(z_target, self._z_bridge)
        peak = f.amax(1, keepdim=True)
        mass = torch.exp(f.sub_(peak), out=self._mass[chosen])
        self._peak[chosen] = peak[:, 0].double()
        if self._normalise:
            highest = self._log_share.amax()
            share = (self._log_share - highest).exp()[None].float()
            total = mass @ gather(share, self._place, len(self._z_bridge))[0]
            self._log_offset[chosen] = total.double().log() + self._peak[chosen] + highest
        at = ((self._probe >= chosen.start) & (self._probe < chosen.stop)).nonzero()[:, 0]
        self._square[at] = self._mass[self._probe[at]].square_()
        self._num = chosen.stop

    def place(self, log_mass: Float[Tensor, "source bridge"]) -> Placed:
        """Prepare what sources put on the bridge (`Chain.start`) to be summed."""
        peak = log_mass.amax(1, keepdim=True)
        mass = (log_mass - peak).exp().float()
        both = gather(torch.cat([mass, mass.square()]), self._place, len(self._z_bridge))
        return Placed(both[: len(mass)], both[len(mass) :], peak)

    def sums(self, placed: Placed, chosen: slice) -> Float[Tensor, "source target"]:
        """Return sums over the bridge for some targets, in float32."""
        return placed.mass @ self._mass[chosen].T

    def look(self, placed: Placed, total: Float[Tensor, "source target"]) -> Look | None:
        """Finish the sums of all targets.

        None: a source and a target lie so far apart that float32 cannot hold their sum, or its square.
        """
        square = placed.square @ self._square.T
        num = len(self._place)
        if _is_lost(total, num) or _is_lost(square, num):
            return None
        found = total.double()
        sample_size = (found[:, self._probe].square() / square.double()).clamp(1.0, float(num))
        return Look(found.log() + placed.peak + (self._peak - self._log_offset), sample_size)

    def weigh(self, log_mass: Float[Tensor, "source bridge"], targets: Int64[Tensor, " target"]) -> Marginal | None:
        """Do as `estimators.weigh` does for a few targets; None if float32 cannot hold it."""
        mass, peak = self._mass[targets].T, self._peak[targets]
        return weigh_exponentials(log_mass, self._place, mass, peak, self._log_share, normalise=self._normalise)


def _is_lost(total: Float[Tensor, "source target"], num: int) -> bool:
    """Tell whether what underflowed could matter."""
    return not bool(total.amin() >= torch.finfo(torch.float32).tiny * num * math.exp(ROUNDING))
