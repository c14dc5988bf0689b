from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.contract.towers import Tower
from worker.learning import caching, grouping, towers
from worker.learning.ragged import Ragged
from worker.learning.towers.transformer import Transformer

CPU = torch.device("cpu")


def tower(dropout: float) -> Transformer:
    torch.manual_seed(1)
    tokens = {"kind": "continuous", "dim": 3, "max_length": 16}
    config = Tower.model_validate({"tokens": tokens, "width": 16, "depth": 2, "dropout": dropout})
    return towers.build(config, None, 8).double()


def ragged(lengths: list[int], seed: int, owners: list[int] | None = None) -> Ragged:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(sum(lengths), 3)))
    return Ragged(values, torch.tensor(lengths), None if owners is None else torch.tensor(owners))


def vectors(model: Transformer, batch: Ragged) -> Tensor:
    """As the model does, in the tower's own precision."""
    tokens = Ragged(batch.values, batch.lengths)
    # Towers read vectors as float32; that costs the two sides of a comparison the same.
    z = functional.normalize(model(tokens), dim=-1)
    if batch.owners is None:
        return z
    return functional.normalize(z.new_zeros(batch.num_items, z.shape[1]).index_add(0, batch.owners, z), dim=-1)


def contrast(z_a: Tensor, z_b: Tensor, scale: Tensor) -> Tensor:
    logits = scale.exp() * z_a @ z_b.T
    targets = torch.arange(len(logits))
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def gradients(
    batches: tuple[Ragged, Ragged], parts: list[list[Tensor]], *, cached: bool, dropout: float = 0.0
) -> dict[str, Tensor]:
    """One step of both towers and a scale, with a generator that starts from the same place."""
    models = [tower(dropout).train() for _ in batches]
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    sides = [
        caching.encode(lambda part, m=model: vectors(m, part), b, p, CPU, learns=True, cached=cached, draws=dropout > 0)
        for model, b, p in zip(models, batches, parts, strict=True)
    ]
    contrast(sides[0].z, sides[1].z, scale).backward()
    for side in sides:
        side.backward()
    found = {f"{at}.{name}": p.grad for at, m in enumerate(models) for name, p in m.named_parameters()}
    assert scale.grad is not None
    return {name: grad for name, grad in found.items() if grad is not None} | {"scale": scale.grad}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(float(grad.abs().max()) > 0 for name, grad in first.items() if "qkv.bias" not in name)
    for name, grad in first.items():
        torch.testing.assert_close(grad, second[name], rtol=1e-6, atol=1e-9, msg=name)


UNEVEN = [3, 9, 1, 16, 4, 4, 12, 2, 7, 5]


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 9])
def test_the_gradient_of_micro_batches_is_that_of_the_whole_batch(micro_batch: int) -> None:
    batches = ragged(UNEVEN, 0), ragged([6] * 10, 1)
    plans = [grouping.plan(grouping.Lengths(batch), micro_batch) for batch in batches]
    assert [len(plan) for plan in plans] == [-(-10 // micro_batch)] * 2
    assert_close(gradients(batches, [[], []], cached=False), gradients(batches, plans, cached=True))


def test_what_dropout_draws_the_first_time_it_draws_the_second_time() -> None:
    """The reference keeps the graph of every micro-batch, so it draws as the first pass does."""
    batches = ragged(UNEVEN, 0), ragged([6] * 10, 1)
    plans = [grouping.plan(grouping.Lengths(batch), 3) for batch in batches]
    kept = gradients(batches, plans, cached=False, dropout=0.3)
    assert_close(kept, gradients(batches, plans, cached=True, dropout=0.3))
    without = gradients(batches, plans, cached=True)
    assert not torch.allclose(kept["0.readout.weight"], without["0.readout.weight"], rtol=1e-2)


def test_items_of_several_sequences_stay_together() -> None:
    owners = [0, 0, 1, 2, 2, 2, 3, 4, 5, 5]
    batches = ragged(UNEVEN, 0, owners), ragged([6] * 6, 1)
    plans = [grouping.plan(grouping.Lengths(batch), 2) for batch in batches]
    assert_close(gradients(batches, [[], []], cached=False), gradients(batches, plans, cached=True))


def test_groups_of_one_length_keep_the_order_and_the_gradient() -> None:
    batches = ragged(UNEVEN, 0), ragged([6] * 10, 1)
    order = torch.tensor(np.argsort(UNEVEN, kind="stable"))
    groups = [[order[:4], order[4:]], []]
    assert_close(gradients(batches, [[], []], cached=False), gradients(batches, groups, cached=False))


def test_after_a_step_the_generator_stands_where_the_first_pass_left_it() -> None:
    model, batch = tower(0.2).train(), ragged(UNEVEN, 0)
    parts = grouping.plan(grouping.Lengths(batch), 4)
    side = caching.encode(lambda part: vectors(model, part), batch, parts, CPU, learns=True, cached=True, draws=True)
    stands = torch.get_rng_state()
    side.z.sum().backward()
    side.backward()
    assert torch.equal(torch.get_rng_state(), stands)


def test_without_dropout_the_first_pass_keeps_no_graph_and_a_locked_tower_never_has_one() -> None:
    model, batch = tower(0.0), ragged(UNEVEN, 0)
    parts = grouping.plan(grouping.Lengths(batch), 4)
    seen: list[bool] = []

    def run(part: Ragged) -> Tensor:
        z = vectors(model, part)
        seen.append(z.requires_grad)
        return z

    options: dict[str, Any] = {"cached": True, "draws": False}
    side = caching.encode(run, batch, parts, CPU, learns=True, **options)
    assert seen == [False] * 3
    side.z.sum().backward()
    side.backward()
    assert seen == [False] * 3 + [True] * 3
    locked = caching.encode(run, batch, parts, CPU, learns=False, **options)
    assert not locked.z.requires_grad
    locked.backward()
    assert seen == [False] * 3 + [True] * 3 + [False] * 3
    torch.testing.assert_close(locked.z, side.z.detach())


@pytest.mark.gpu
def test_on_a_gpu_dropout_draws_the_same_again() -> None:
    device = torch.device("cuda")
    model, batch = tower(0.3).float().to(device).train(), ragged(UNEVEN, 0)
    batch = Ragged(batch.values.float(), batch.lengths)
    parts = grouping.plan(grouping.Lengths(batch), 4)
    grads: list[Tensor] = []
    for cached in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        side = caching.encode(
            lambda part: vectors(model, part.to(device)), batch, parts, device, learns=True, cached=cached, draws=True
        )
        side.z[:, 0].sum().backward()
        side.backward()
        grads.append(model.readout.weight.grad.clone())  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
