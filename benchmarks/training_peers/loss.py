"""One loss at one batch size: forward and backward on command, and what that costs.

`ours` and `sigmoid` are what a training calls. `dense` is what autograd makes of the same formula, with the matrix of
logits in full; `products` are the three matrix products that no such loss can do without.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.training_peers.turns import answer, asked, forget_peak, peak, resident
from service.contract.losses import InfoNCE, Sigmoid
from worker.learning import losses

DIMENSIONS: Final = 512
WARM_UP: Final = 64


def operands(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw unit vectors of two sides; a scale and a bias."""
    generator = torch.Generator().manual_seed(0)
    z_a, z_b = (functional.normalize(torch.randn(batch, DIMENSIONS, generator=generator)) for _ in range(2))
    scale, bias = torch.tensor(1 / 0.07), torch.tensor(-10.0)
    return z_a.requires_grad_(), z_b.requires_grad_(), scale.requires_grad_(), bias.requires_grad_()


def dense(z_a: Tensor, z_b: Tensor, scale: Tensor) -> Tensor:
    """Compute symmetric InfoNCE by autograd."""
    logits = scale * z_a @ z_b.T
    targets = torch.arange(len(logits))
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def run(kind: str, z_a: Tensor, z_b: Tensor, scale: Tensor, bias: Tensor) -> float:
    """Compute a loss and its gradients; return it."""
    if kind == "products":
        with torch.no_grad():
            weights = z_a @ z_b.T
            z_a.grad, z_b.grad = weights @ z_b, weights.T @ z_a
        return math.nan
    match kind:
        case "ours":
            loss = losses.compute(InfoNCE(), z_a, z_b, scale)
        case "sigmoid":
            loss = losses.compute(Sigmoid(), z_a, z_b, scale, bias)
        case "dense":
            loss = dense(z_a, z_b, scale)
        case _:
            raise ValueError(kind)
    for leaf in (z_a, z_b, scale, bias):
        leaf.grad = None
    loss.backward()
    return float(loss.detach())


def main(kind: str, batch: int) -> None:
    """Run it as often as asked."""
    run(kind, *operands(WARM_UP))
    given = operands(batch)
    while True:
        times: int = asked()["times"]
        for leaf in given:
            leaf.grad = None
        forget_peak()
        before, cpu_s = resident(), time.process_time()
        loss = math.nan
        for _ in range(times):
            loss = run(kind, *given)
        cpu_s = time.process_time() - cpu_s
        told: dict[str, Any] = {"cpu_ms": 1000 * cpu_s / times, "peak": peak() - before}
        answer(told if math.isnan(loss) else told | {"loss": loss})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
