"""One way to sum over a bridge, in a process of its own: on command for all targets, and what that costs.

`products` are the matrix products that no such sum can do without: the scores of bridge and targets, and the sources'
masses with them, streamed in the blocks that we stream in, in which they run fastest too. `broadcast` is what the
formula says: sources x bridge x targets in one tensor.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, assert_never, cast, final, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.training_peers.turns import answer, asked, forget_peak, peak, resident
from worker.composition.chains import Bridge, Chain, Ending
from worker.composition.search import top_k
from worker.composition.streaming import BLOCK_SCORES, ROWS, Link, Masses
from worker.serving.compose import Composer
from worker.serving.ways import Summed

Kind = Literal["products", "bf16", "fixed", "maxima", "ranked", "answered", "broadcast"]
SCALES: Final = {"fixed": 20.0, "maxima": 100.0}
"""Up to 60 one shift serves all cosines; above, every column has its own."""
WIDTH: Final = 4096
"""Targets that `ranked` reads from their file at once."""
BEST: Final = 10
WARM_UP: Final = 64
CLUSTERS: Final = 64
ENDS: Final = ((1, "sources"), (2, "bridge"))
"""What is drawn, with its seed; the file's is 3."""


@final
@dataclass(frozen=True)
class Sizes:
    """How many there are."""

    sources: int = 64
    bridge: int = 10_000
    targets: int = 100_000
    dim: int = 256


def draw(num: int, dim: int, seed: int) -> Tensor:
    """Draw unit vectors in clusters, as trained ones lie, so that the scores of a target reach far up and down."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLUSTERS, dim, generator=torch.Generator().manual_seed(0))
    at = torch.randint(CLUSTERS, (num,), generator=generator)
    z = torch.randn(num, dim, generator=generator).add_(centres[at])
    return functional.normalize(z, out=z)


@final
class Operands:
    """Vectors of everything; the targets lie in a file."""

    def __init__(self, sizes: Sizes, file: Path, device: torch.device) -> None:
        self.device = device
        self.source, self.bridge = (draw(getattr(sizes, name), sizes.dim, at).to(device) for at, name in ENDS)
        self.mapped = np.load(file, mmap_mode="r")
        self.target = torch.tensor(self.mapped, device=device)

    def chain(self, scale: float) -> Chain:
        """Link everything."""
        link = Link("cosine", scale)
        return Chain((link, link), (Bridge(self.bridge, self.bridge),))


def products(given: Operands, num: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Do the three products, and nothing else."""
    source, bridge, target = (z.to(dtype) for z in (given.source, given.bridge, given.target[:num]))
    mass = source @ bridge.T
    rows = min(len(bridge), ROWS) if given.device.type == "cpu" else len(bridge)
    width = max(1, BLOCK_SCORES[given.device.type] // rows)
    buffer = bridge.new_empty(rows * width)
    found = torch.zeros(len(mass), num, device=given.device)
    for begin in range(0, num, width):
        columns = target[begin : begin + width]
        for first in range(0, len(bridge), rows):
            block = bridge[first : first + rows]
            f = buffer[: len(block) * len(columns)].view(len(block), len(columns))
            torch.mm(block, columns.T, out=f)
            found[:, begin : begin + width] += mass[:, first : first + rows] @ f
    return found


def sums(given: Operands, num: int, scale: float) -> Tensor:
    """Return log sum_b p(b | source) e^f(b, target), of all sources and targets."""
    chain = given.chain(scale)
    return Masses(chain.start(given.source), chain.links[1], chain.bridges[0].right).log_products(given.target[:num])


def ranked(given: Operands, num: int) -> Tensor:
    """Find the best targets of each source, reading the targets from their file; offsets are removed."""
    chain = given.chain(SCALES["fixed"])
    blocks = (
        torch.tensor(given.mapped[begin : min(num, begin + WIDTH)], device=given.device)
        for begin in range(0, num, WIDTH)
    )
    return top_k(Ending(chain, chain.start(given.source)), blocks, BEST).score


def answered(given: Operands, num: int) -> Tensor:
    """Answer as the inference process and the job do: with sample sizes, errors and warnings."""
    way = Summed(given.chain(SCALES["fixed"]), comparable=True)
    source = given.source.cpu().numpy()
    composer = Composer(way, source, given.mapped[:num], log_prior=None, top_k=BEST, device=given.device)
    return torch.from_numpy(composer.answer_at_once()[1]["log_ratio"])


def broadcast(given: Operands, num: int) -> Tensor:
    """Do as `sums` does, over a tensor of sources x bridge x targets."""
    link = Link("cosine", SCALES["fixed"])
    log_mass = link.scores(given.source, given.bridge).log_softmax(1)
    return (log_mass[:, :, None] + link.scores(given.bridge, given.target[:num])[None]).logsumexp(1)


def run(kind: Kind, given: Operands, num: int) -> Tensor:
    """Compose with the first targets."""
    match kind:
        case "products":
            return products(given, num)
        case "bf16":
            return products(given, num, torch.bfloat16)
        case "fixed" | "maxima":
            return sums(given, num, SCALES[kind])
        case "ranked":
            return ranked(given, num)
        case "answered":
            return answered(given, num)
        case "broadcast":
            return broadcast(given, num)
        case _:
            assert_never(kind)


@torch.inference_mode()
def measure(kind: Kind, given: Operands, num: int) -> dict[str, float]:
    """Run it, and tell its milliseconds, the most bytes beside the operands, and the mean of the values.

    Time is that of the CPU, all threads, or of the device.
    """
    on_cpu = given.device.type == "cpu"
    if on_cpu:
        forget_peak()
        before, began = resident(), time.process_time()
        found = run(kind, given, num)
        took, most = time.process_time() - began, peak()
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        found = run(kind, given, num)
        torch.cuda.synchronize()
        took, most = time.perf_counter() - began, torch.cuda.max_memory_allocated()
    return {"ms": 1000 * took, "peak": most - before, "mean": float(found.mean(dtype=torch.float64))}


def main(kind: Kind, file: Path, device: torch.device, precision: str, sizes: Sizes) -> None:
    """Run it as often as asked."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    given = Operands(sizes, file, device)
    measure(kind, given, WARM_UP)
    while True:
        answer(measure(kind, given, asked()["num"]))


if __name__ == "__main__":
    _, kind_, file_, device_, precision_, sizes_ = sys.argv
    assert kind_ in get_args(Kind)
    main(cast("Kind", kind_), Path(file_), torch.device(device_), precision_, Sizes(**json.loads(sizes_)))
