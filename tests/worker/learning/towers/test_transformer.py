from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from service.contract.towers import Tower
from worker.learning import towers
from worker.learning.ragged import Ragged
from worker.learning.towers.rotary import turn_of
from worker.learning.towers.transformer import PIXEL_MEAN, Transformer

TOKENS: dict[str, dict[str, Any]] = {
    "image": {"kind": "image", "size": 8, "patch": 4, "channels": 1},
    "text": {"kind": "text", "max_length": 12},
    "audio": {"kind": "audio", "mels": 8, "frames": 2, "window_s": 0.5},
    "discrete": {"kind": "discrete", "vocab": 30, "max_length": 12},
    "continuous": {"kind": "continuous", "dim": 5, "max_length": 12},
}
KINDS = list(TOKENS)


POOLINGS = ["mean", "cls", "attention"]
POSITIONS = ["learned", "rotary"]


def build(kind: str, **options: Any) -> Transformer:
    """Build a tower as if it had learned something: its pooling's query is not zero any more."""
    torch.manual_seed(0)
    config = Tower.model_validate({"tokens": TOKENS[kind], "width": 16, "depth": 2, "heads": 2} | options)
    tower = towers.build(config, 30 if kind in {"text", "discrete"} else None, 6).eval()
    if tower.pool is not None:
        torch.nn.init.normal_(tower.pool.query)
    return tower


def sequence(kind: str, length: int, rng: np.random.Generator) -> np.ndarray:
    match kind:
        case "image":
            return rng.integers(0, 256, (4, 16), np.uint8)
        case "text" | "discrete":
            return rng.integers(0, 30, length, np.int32)
        case _:
            return rng.normal(size=(length, 16 if kind == "audio" else 5)).astype(np.float32)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_has_the_same_vector_alone_and_padded_in_a_batch(kind: str, pooling: str, positions: str) -> None:
    rng = np.random.default_rng(1)
    items = [[sequence(kind, length, rng)] for length in (3, 12, 1, 7)]
    tower = build(kind, pooling=pooling, positions=positions)
    with torch.no_grad():
        together = tower(Ragged.from_sequences(items))
        alone = torch.cat([tower(Ragged.from_sequences([item])) for item in items])
    assert together.shape == (4, 6)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_tokens_matters(kind: str, pooling: str, positions: str) -> None:
    tokens = sequence(kind, 4, np.random.default_rng(2))
    tower = build(kind, pooling=pooling, positions=positions)
    z = tower(Ragged.from_sequences([[tokens], [tokens[::-1].copy()]]))
    assert (z[0] - z[1]).abs().max() > 1e-3


def test_a_rotary_tower_has_no_table_of_places_and_does_not_see_where_a_sequence_begins() -> None:
    """One block, whose scores are all that depends on places: a shift of all of them changes nothing."""
    tower = build("continuous", positions="rotary", depth=1).double()
    assert "positions" not in tower.state_dict()
    torch.manual_seed(3)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    seen = [tower.blocks[0](x, None, turn_of(torch.arange(5.0, dtype=torch.float64) + at, 8)) for at in (0, 40)]
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_blocks_computed_again_on_the_way_back_give_the_same_gradient_dropout_included(
    pooling: str, positions: str
) -> None:
    rng = np.random.default_rng(4)
    batch = Ragged.from_sequences([[sequence("continuous", length, rng)] for length in (3, 7)])
    gradients: list[list[torch.Tensor]] = []
    for recomputes in (False, True):
        tower = build("continuous", pooling=pooling, positions=positions, dropout=0.3).double().train()
        tower.recomputes = recomputes
        torch.manual_seed(5)
        loss = tower(batch).square().sum()
        after = torch.rand(3)  # the generator is where it would be
        gradients.append([*torch.autograd.grad(loss, list(tower.parameters())), loss.detach(), after])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_recomputing_keeps_less_between_the_passes() -> None:
    kept: list[int] = []
    for recomputes in (False, True):
        tower = build("continuous", depth=6).train()
        tower.recomputes = recomputes
        num_bytes = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal num_bytes
            num_bytes += tensor.nbytes
            return tensor

        batch = Ragged.from_sequences([[sequence("continuous", 12, np.random.default_rng(6))] for _ in range(8)])
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            tower(batch)
        kept.append(num_bytes)
    assert kept[1] < 0.4 * kept[0]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["text", "continuous"])
def test_every_tower_runs_in_bf16_close_to_fp32(kind: str, pooling: str, positions: str) -> None:
    rng = np.random.default_rng(7)
    batch = Ragged.from_sequences([[sequence(kind, length, rng)] for length in (3, 12, 7)])
    tower = build(kind, pooling=pooling, positions=positions).train()
    exact = tower(batch)
    with torch.autocast("cpu", torch.bfloat16):
        z = tower(batch)
    assert torch.cosine_similarity(z.float(), exact).min() > 0.999
    z.float().sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_a_locked_tower_stays_in_evaluation_mode() -> None:
    tower = build("text", dropout=0.5)
    tower.is_locked = True
    torch.nn.ModuleList([tower]).train()
    assert not any(module.training for module in tower.modules())


def test_the_base_preset_over_patches_of_32_is_the_image_tower_of_clip() -> None:
    """Radford et al. 2021, ViT-B/32: 87.8 million parameters with its projection into 512 dimensions."""
    tokens = {"kind": "image", "size": 224, "patch": 32}
    config = Tower.model_validate({"tokens": tokens, "preset": "base", "pooling": "cls"})
    with torch.device("meta"):
        tower = towers.build(config, None, 512)
    assert sum(parameter.numel() for parameter in tower.parameters()) == pytest.approx(87_849_216, rel=1e-4)
    assert config.tokens.max_length == 49


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
