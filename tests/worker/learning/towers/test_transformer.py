from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch

from service.contract.towers import Tower
from worker.learning import towers
from worker.learning.ragged import Ragged
from worker.learning.towers.transformer import PIXEL_MEAN, Transformer

TOKENS: dict[str, dict[str, Any]] = {
    "image": {"kind": "image", "size": 8, "patch": 4, "channels": 1},
    "text": {"kind": "text", "max_length": 12},
    "audio": {"kind": "audio", "mels": 8, "frames": 2, "window_s": 0.5},
    "discrete": {"kind": "discrete", "vocab": 30, "max_length": 12},
    "continuous": {"kind": "continuous", "dim": 5, "max_length": 12},
}
KINDS = list(TOKENS)


def build(kind: str, pooling: Literal["mean", "cls"] = "mean") -> Transformer:
    torch.manual_seed(0)
    config = Tower.model_validate({"tokens": TOKENS[kind], "width": 16, "depth": 2, "heads": 2, "pooling": pooling})
    return towers.build(config, 30 if kind in {"text", "discrete"} else None, 6).eval()


def sequence(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    match kind:
        case "image":
            return rng.integers(0, 256, (4, 16), np.uint8)
        case "text" | "discrete":
            return rng.integers(0, 30, length, np.int32)
        case _:
            return rng.normal(size=(length, 16 if kind == "audio" else 5)).astype(np.float32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_the_same_vector_alone_and_padded_in_a_batch(kind: str, pooling: Literal["mean", "cls"]) -> None:
    rng = np.random.default_rng(1)
    items = [[sequence(kind, length, rng)] for length in (3, 12, 1, 7)]
    tower = build(kind, pooling)
    with torch.no_grad():
        together = tower(Ragged.from_sequences(items))
        alone = torch.cat([tower(Ragged.from_sequences([item])) for item in items])
    assert together.shape == (4, 6)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tokens_matters(kind: str) -> None:
    tokens = sequence(kind, 4, np.random.default_rng(2))
    z = build(kind)(Ragged.from_sequences([[tokens], [tokens[::-1].copy()]]))
    assert (z[0] - z[1]).abs().max() > 1e-3


def test_one_seed_gives_one_tower() -> None:
    first, second = build("text").state_dict(), build("text").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pixels_have_a_fixed_first_step_and_other_vectors_a_measured_one() -> None:
    image = build("image").state_dict()
    assert image["mean"].unique().tolist() == [PIXEL_MEAN]
    tower = build("continuous")
    values = torch.randn(1000, 5) * torch.tensor([1.0, 100.0, 1e-3, 5.0, 0.0]) + torch.tensor([0.0, 7, 3, -4, 2])
    tower.measure(values)
    seen = (values - tower.state_dict()["mean"]) / tower.state_dict()["deviation"]
    torch.testing.assert_close(seen[:, :4].std(0), torch.ones(4), atol=0.01, rtol=0)
    torch.testing.assert_close(seen.mean(0), torch.zeros(5), atol=0.01, rtol=0)
    assert seen[:, 4].unique().tolist() == [0.0]


def test_the_unit_of_a_sensor_does_not_matter_once_it_is_measured() -> None:
    rng = np.random.default_rng(3)
    readings = [[sequence("continuous", 6, rng)] for _ in range(20)]
    vectors: list[torch.Tensor] = []
    for unit in (1.0, 1000.0):
        batch = Ragged.from_sequences([[reading[0] * np.float32(unit)] for reading in readings])
        tower = build("continuous")
        tower.measure(batch.values)
        vectors.append(tower(batch))
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-4, rtol=1e-4)
