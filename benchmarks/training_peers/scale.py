"""Our towers and losses at a size that is trained in earnest, on a device, with batches that are ready in memory.

Each process measures one batch size. The steps are those of the train job without data sets and reports.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from benchmarks.training_peers.task import tower_of
from benchmarks.training_peers.turns import answer
from service.contract.recipe import Optimiser, Recipe
from service.contract.towers import Tower
from worker.learning import losses, optim
from worker.learning.device import failure_of, precision_of
from worker.learning.encoding import BatchEncoder
from worker.learning.model import MultiTower
from worker.learning.ragged import Ragged

VOCAB: Final = 49_408  # CLIP's
PEAK_TFLOPS: Final = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""bf16 products without sparsity, by what a device's name contains; from NVIDIA's data sheets."""
_DISTINCT: Final = 1024
_WARM_UP: Final = 2


def recipe(micro_batch: int | None) -> Recipe:
    """Write the recipe of CLIP's ViT-B/32."""
    return Recipe.model_validate(
        {
            "towers": {
                "image": {
                    "tokens": {"kind": "image", "size": 224, "patch": 32},
                    "preset": "base",
                    "pooling": "cls",
                },
                "text": {"tokens": {"kind": "text", "vocab": VOCAB, "max_length": 77}, "preset": "medium"},
            },
            "pairs": [{"dataset": "ds_bench", "modalities": ["image", "text"]}],
            "dimensions": 512,
            "precision": "bf16",
            "compute": {"micro_batch": micro_batch},
        }
    )


def tower_flops(tower: Tower, dimensions: int) -> int:
    """Count the floating-point operations that one sequence of full length takes, forward and backward.

    A product of (m, k) and (k, n) is 2 m k n, and two of the same size are its gradients; pixels have none. Norms,
    activations and what a micro-batch computes again are no work of the model's.
    """
    width, hidden = tower.width, round(tower.mlp_ratio * tower.width)
    length = tower.tokens.max_length + (tower.pooling == "cls")
    linear = 2 * length * (4 * width * width + 2 * width * hidden)
    attention = 4 * length * length * width
    forward = tower.depth * (linear + attention) + 2 * width * dimensions
    embedding = 2 * tower.tokens.max_length * tower.tokens.dim * width if tower.tokens.kind == "image" else 0
    return 3 * forward + 2 * embedding


def sample_flops(config: Recipe, batch: int) -> int:
    """Count the operations of one sample of a batch: both towers, and its row of three products of the loss."""
    towers = sum(tower_flops(tower_of(config, name), config.dimensions) for name in config.towers)
    return towers + 3 * 2 * batch * config.dimensions


def utilisation(rate: float, flops: int, peak_tflops: float) -> float:
    """Return the share of a device's peak that is the model's own work, at a rate in samples per second."""
    return rate * flops / (peak_tflops * 1e12)


@final
@dataclass(frozen=True)
class Found:
    """Samples per second, and the most device memory that a step took (0 on the CPU)."""

    rate: float
    peak_bytes: int


def draw(config: Recipe, batch: int) -> tuple[Ragged, Ragged]:
    """Draw a batch of full sequences; some of it, again and again."""
    generator = torch.Generator().manual_seed(0)
    num, times = min(batch, _DISTINCT), -(-batch // _DISTINCT)
    image, text = tower_of(config, "image").tokens, tower_of(config, "text").tokens
    assert image.kind == "image"
    patches = torch.randint(256, (num, image.max_length, image.dim), dtype=torch.uint8, generator=generator)
    ids = torch.randint(VOCAB, (num, text.max_length), generator=generator)
    first = patches.repeat(times, 1, 1)[:batch].flatten(0, 1)
    second = ids.repeat(times, 1)[:batch].flatten()
    return (
        Ragged(first, torch.full((batch,), image.max_length)),
        Ragged(second, torch.full((batch,), text.max_length)),
    )


def measure(config: Recipe, batch: int, device: torch.device, num_steps: int) -> Found:
    """Take steps on one batch; raises what torch raises where it does not fit."""
    torch.manual_seed(0)
    model = MultiTower(config, {"text": VOCAB}).to(device)
    optimiser = optim.build(Optimiser(), model.named_parameters())
    encode = BatchEncoder(model, config, device, precision_of(config.precision, device))
    parameters = list(model.parameters())
    first, second = draw(config, batch)
    loss_config = config.loss_of(config.pairs[0])
    began = 0.0
    for step in range(_WARM_UP + num_steps):
        if step == _WARM_UP:
            began = _now(device)
        side_a, side_b = encode("image", first), encode("text", second)
        loss = losses.compute(loss_config, side_a.z, side_b.z, model.scale("image", "text"))
        optimiser.zero_grad()
        loss.backward()
        side_a.backward()
        side_b.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        model.clamp_scales()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Found(num_steps * batch / (_now(device) - began), peak)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def main(told: dict[str, Any]) -> None:
    """Measure one batch size and end."""
    try:
        found = measure(recipe(told["micro_batch"]), told["batch"], torch.device("cuda"), told["steps"])
    except (RuntimeError, MemoryError) as error:
        failure = failure_of(error)
        if failure is None or failure.code != "out_of_memory":
            raise
        answer({"fits": False})
    else:
        answer({"fits": True, "rate": found.rate, "peak": found.peak_bytes})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
