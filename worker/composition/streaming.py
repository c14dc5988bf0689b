"""Sums over a bridge of any size for targets of any number, in blocks of scores that are never kept.

The scores of a block are exponentiated in place, in float32, and multiplied with what the sources put on the bridge;
whatever float32 cannot hold is found afterwards and summed again in float64. Where the scale bounds the scores (the
cosine) no maxima are needed: float32 spans 174 nats, and the scale says where to put them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from worker.composition.estimators import ROUNDING, ROWS_AT_ONCE
from worker.learning import critics

if TYPE_CHECKING:
    from service.contract.losses import Critic

HIGHEST: Final = 87.0  # nats: e^87 is near the largest number of float32
LOWEST: Final = -87.0  # and e^-87 near the smallest that has all its digits
LARGEST_FIXED: Final = 60.0  # the scale up to which one shift serves all scores
ROWS: Final = 2048  # bridge items of a block on the CPU: with its columns the block stays in a core's cache
BLOCK_SCORES: Final = {"cpu": 1 << 20, "cuda": 1 << 26}


@final
@dataclass(frozen=True)
class Link:
    """A trained pair as a step of a composition: how its vectors are compared, and its trained scale."""

    critic: Critic
    scale: float

    def scores(self, z_a: Float[Tensor, "row dim"], z_b: Float[Tensor, "column dim"]) -> Float[Tensor, "row column"]:
        """Return the logits of all of one side with all of the other, but for the bias; vectors are prepared."""
        return self.scale * critics.scores(self.critic, z_a, z_b)


@final
class Masses:
    """Rows of masses on the items of a bridge, ready to be carried over a link to any number of targets."""

    def __init__(
        self, log_mass: Float[Tensor, "source bridge"], link: Link, z_bridge: Float[Tensor, "bridge dim"]
    ) -> None:
        """Take the logs of the masses, float64; -inf is an item that does not count, and no row has only such."""
        self.log_mass, self.link, self.z_bridge = log_mass, link, z_bridge
        self._inner = link.scale * critics.as_inner_products(link.critic, z_bridge, z_bridge[:1])[0]
        log_num = math.log(len(z_bridge))
        room = HIGHEST - log_num
        self._is_fixed = link.critic == "cosine" and link.scale <= LARGEST_FIXED
        # As high as the largest products allow, so that the smallest that are lost lie deep.
        self._column_top = link.scale if self._is_fixed else room / 2
        self._row_top = room - self._column_top
        self._peak = log_mass.amax(1, keepdim=True)
        shifted = log_mass - self._peak + self._row_top
        self._mass = shifted.exp().float()
        # What was cut off here, or will be of the scores, could have met the largest on the other side.
        is_cut = ((shifted < LOWEST) & (log_mass > -math.inf)).any(1, keepdim=True)
        largest = torch.where(is_cut, max(0.0, self._column_top), 0.0 if self._is_fixed else self._row_top)
        self._least = largest.double() + LOWEST + log_num + ROUNDING
        size = BLOCK_SCORES.get(z_bridge.device.type, BLOCK_SCORES["cpu"])
        self._rows = min(len(z_bridge), ROWS if z_bridge.device.type == "cpu" else size)
        self._width = max(1, size // self._rows)

    def log_products(self, z_target: Float[Tensor, "target dim"]) -> Float[Tensor, "source target"]:
        """Return log sum_m mass[s, m] e^f(m, t), float64: no sum is lost to underflow, however deep it lies."""
        inner = critics.as_inner_products(self.link.critic, z_target[:1], z_target)[1]
        buffer = z_target.new_empty(self._rows * min(self._width, len(z_target)))
        parts = [self._block(columns, buffer) for columns in inner.split(self._width)]
        log_sum = torch.cat([total.log() for total, _ in parts], 1)
        is_lost = ~(log_sum >= self._least)
        log_sum += self._peak - self._row_top
        if not self._is_fixed:
            log_sum += torch.cat([peak for _, peak in parts]) - self._column_top
        if bool(is_lost.any()):
            self._repair(log_sum, is_lost, z_target)
        return log_sum

    def _block(
        self, inner: Float[Tensor, "target inner"], buffer: Float[Tensor, " score"]
    ) -> tuple[Float[Tensor, "source target"], Float[Tensor, " target"]]:
        """Return sums over the bridge for a few targets, and which score of each was brought to the top."""
        num = len(inner)
        total = self.log_mass.new_zeros(len(self.log_mass), num)
        peak = inner.new_full((num,), -math.inf)
        for begin in range(0, len(self._inner), self._rows):
            rows = self._inner[begin : begin + self._rows]
            f = buffer[: len(rows) * num].view(len(rows), num)
            torch.mm(rows, inner.T, out=f)
            if not self._is_fixed:
                higher = torch.maximum(peak, f.amax(0))
                total *= (peak - higher).double().exp()
                peak = higher
                f -= higher - self._column_top
            total += self._mass[:, begin : begin + self._rows] @ f.exp_()
        return total, peak

    def _repair(
        self,
        log_sum: Float[Tensor, "source target"],
        is_lost: Bool[Tensor, "source target"],
        z_target: Float[Tensor, "target dim"],
    ) -> None:
        """Sum again, in float64, where float32 underflows: the sources' items and the target's lie far apart."""
        rows, columns = (is_lost.any(axis).nonzero()[:, 0] for axis in (1, 0))
        log_mass = self.log_mass[rows]
        for chosen in columns.split(max(1, ROWS_AT_ONCE // len(self.z_bridge))):
            f = self.link.scores(self.z_bridge, z_target[chosen]).double()
            log_sum[rows[:, None], chosen] = torch.where(
                is_lost[rows[:, None], chosen], log_matmul(log_mass, f), log_sum[rows[:, None], chosen]
            )


def log_matmul(log_a: Float[Tensor, "row inner"], log_b: Float[Tensor, "inner column"]) -> Float[Tensor, "row column"]:
    """Return log(e^a @ e^b) of matrices in float64; sums below the range of float64 are taken one by one."""
    peak_a, peak_b = log_a.amax(1, keepdim=True), log_b.amax(0)
    found = ((log_a - peak_a).exp() @ (log_b - peak_b).exp()).log()
    smallest = math.log(torch.finfo(torch.float64).tiny * log_a.shape[1]) + ROUNDING
    rows, columns = (found < smallest).nonzero(as_tuple=True)
    found += peak_a + peak_b
    at_once = max(1, ROWS_AT_ONCE // log_a.shape[1])
    for i, j in zip(rows.split(at_once), columns.split(at_once), strict=True):
        found[i, j] = (log_a[i] + log_b.T[j]).logsumexp(1)
    return found
