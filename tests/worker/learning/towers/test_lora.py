from __future__ import annotations

import pytest
import torch
from torch import nn

from service.contract.towers import LoRA
from worker.learning.towers import lora
from worker.learning.towers.transformer import Block

CONFIG = LoRA(rank=2, alpha=6.0)


def block() -> Block:
    torch.manual_seed(0)
    return Block(8, 2, 16, 0.0).double()


def adapted() -> Block:
    found = block().requires_grad_(requires_grad=False)
    lora.adapt(found, CONFIG)
    return found.double()


def test_it_starts_as_the_block_that_it_was() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert torch.equal(adapted()(x, None), block()(x, None))


def test_only_the_factors_learn_and_the_weights_keep_their_names() -> None:
    plain, learning = block().state_dict(), adapted()
    names = {name for name, parameter in learning.named_parameters() if parameter.requires_grad}
    assert names == {f"{matrix}.lora_{half}" for matrix in lora.MATRICES for half in "ab"}
    assert all(torch.equal(learning.state_dict()[name], value) for name, value in plain.items())


def test_the_matrix_grows_by_the_product_of_the_factors_and_merging_adds_the_same() -> None:
    learning = adapted()
    for name, parameter in learning.named_parameters():
        if lora.is_factor(name):
            nn.init.normal_(parameter)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    weights = {f"tower_a.{name}": value for name, value in learning.state_dict().items()}
    others = {"tower_b.up.lora_a": torch.ones(1), "log_scales.a+b": torch.ones(())}
    merged = lora.merged(weights | others, "tower_a.", CONFIG)
    update = weights["tower_a.up.lora_b"] @ weights["tower_a.up.lora_a"]
    torch.testing.assert_close(merged["tower_a.up.weight"], weights["tower_a.up.weight"] + 3.0 * update)
    plain = block()
    plain.load_state_dict(
        {name.removeprefix("tower_a."): value for name, value in merged.items() if name not in others}
    )
    torch.testing.assert_close(plain(x, None), learning(x, None))
    assert others.keys() <= merged.keys()
    assert lora.merged(merged, "tower_a.", CONFIG).keys() == merged.keys()


@pytest.mark.parametrize("rank", [1, 8])
def test_the_rank_of_what_is_learned_is_that_of_the_recipe(rank: int) -> None:
    found = block()
    lora.adapt(found, LoRA(rank=rank))
    shapes = {name: tuple(value.shape) for name, value in found.state_dict().items() if lora.is_factor(name)}
    assert shapes["qkv.lora_a"] == (rank, 8)
    assert shapes["qkv.lora_b"] == (24, rank)
