"""How a composition is cut into steps of bounded arithmetic and memory."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, final

import torch

from worker.composition.chains import ROUNDS
from worker.composition.streaming import BLOCK_SCORES, ROWS
from worker.serving import ways
from worker.serving.ways import Summed, Way

if TYPE_CHECKING:
    from worker.serving.known import Known

STEP_PRODUCTS: Final = 1 << 31  # multiplications of a step, some thirty milliseconds of one core
COLUMNS: Final = BLOCK_SCORES["cpu"] // ROWS  # targets that a sum takes at once: a few left over cost as much
PRODUCTS_PER_TOKEN: Final = 1 << 16  # puts a step of composition and a step of embedding on one scale
SHORT: Final = 1 << 9  # tokens' worth of multiplications, about a millisecond
BLOCK_VALUES: Final = 1 << 22  # of one matrix of a step: bridge by targets, or sources by bridge
MAX_WIDTH: Final = 4096
PROBE: Final = 256  # targets on which the health of a sum is judged, where not all are looked at anyway
ALL: Final = 512  # targets up to which they are


@final
@dataclass(frozen=True)
class Sizes:
    """How a question is cut, by the largest matrix and the number of multiplications that each way has in a step."""

    sources: int  # at once
    probe: int  # targets on which a sum's health is judged
    weighed: int  # targets of a step that looks closely
    ranked: int  # targets of a step that ranks
    carried: int  # bridge items of a step between two bridges
    added: int  # targets of a step that makes columns to keep; 0: none are kept
    taken: int  # targets of a step that sums over them
    num_steps: int
    length: int

    @staticmethod
    def of(way: Way, num_sources: int, shape: tuple[int, ...], top_k: int, known: Known | None = None) -> Sizes:
        """Cut a question whose targets have this shape."""
        num, dim = shape
        bridges = [len(z) for z, _ in ways.bridges_of(way)]
        largest = max(bridges, default=1)
        sources = min(num_sources, max(1, BLOCK_VALUES // 2 // max(largest, 1)))
        is_sum = isinstance(way, Summed)
        per_target = bridges[-1] * (dim + sources) if is_sum else sources * dim
        per_weighed = bridges[-1] * (dim + 6 * sources) if is_sum else 1
        ranked = _width(per_target, max(1, BLOCK_VALUES // sources))
        ranked -= ranked % COLUMNS if ranked > COLUMNS else 0
        weighed = _width(per_weighed, max(1, BLOCK_VALUES // largest))
        if len(bridges) > 1:
            weighed = max(weighed, min(PROBE, num))  # every step goes over all scores between two bridges
        carried = _width(largest * (dim + sources), MAX_WIDTH)
        winners = min(num, sources * top_k)
        fits = sources * num <= BLOCK_VALUES
        keeps = is_sum and len(bridges) == 1 and fits and 2 * winners <= num
        keeps = keeps and known is not None and known.takes(num * largest)
        takes_all = num <= ALL or (fits and not keeps and 2 * (winners + PROBE) >= num)
        probe = num if takes_all else PROBE
        steps, products = math.ceil(num / ranked), num * per_target
        if is_sum:
            steps = math.ceil(probe / weighed) + (0 if takes_all else steps + math.ceil(winners / weighed))
            products = probe * per_weighed + (0 if takes_all else products + winners * per_weighed)
            steps += sum(math.ceil(each / carried) for each in bridges[1:])
            products += sum(first * second * (dim + sources) for first, second in pairwise(bridges))
        elif bridges:
            products += sources * bridges[0] * dim
        chunks = math.ceil(num_sources / sources)
        added = taken = 0
        if keeps and known is not None:
            added = _width(largest * dim, max(1, BLOCK_VALUES // largest))
            taken = _width(largest * sources, max(1, BLOCK_VALUES // sources))
            # Should float32 not hold a sum, the whole is done without columns, in a long last step: they are few.
            is_here = known.columns is not None
            steps = math.ceil(num / taken) + math.ceil(winners / weighed)
            products = num * largest * sources + winners * per_weighed
            if not is_here:
                steps, products = steps + math.ceil(num / added), products + num * largest * dim
        steps, products = steps * chunks, products * chunks
        if is_sum and len(way.chain.offsets) < len(bridges) - 1:
            steps += sum(ROUNDS * math.ceil(each / carried) for pair in pairwise(bridges) for each in pair)
            products += sum(2 * ROUNDS * first * second * dim for first, second in pairwise(bridges))
        length = max(1, products // steps // PRODUCTS_PER_TOKEN)
        return Sizes(sources, probe, weighed, ranked, carried, added, taken, steps, length)

    @contextmanager
    def threads(self) -> Generator[None]:
        """Compute short steps in one thread, which on busy cores takes less time than waiting for others."""
        num = torch.get_num_threads()
        if num == 1 or self.length > SHORT:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num)


def _width(products_each: int, most: int) -> int:
    return max(1, min(STEP_PRODUCTS // max(1, products_each), most, MAX_WIDTH))
