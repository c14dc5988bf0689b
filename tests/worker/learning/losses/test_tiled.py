"""The losses in tiles are the dense ones, for every critic and in shapes that tiles do not divide."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.contract.losses import Critic
from worker.learning.losses import contrast, tiled

CRITICS: tuple[Critic, ...] = get_args(Critic)
Compute = Callable[[Critic, Tensor, Tensor, Tensor, Tensor], Tensor]

LOSSES: dict[str, Compute] = {
    "both": lambda critic, a, b, scale, _: contrast.info_nce(critic, a, b, scale),
    "one_side": lambda critic, a, b, scale, _: contrast.one_sided_info_nce(critic, a, b, scale),
    "sigmoid": contrast.sigmoid,
}
ACROSS: dict[str, Compute] = {
    "one_side": lambda critic, a, b, scale, _: contrast.one_sided_info_nce(critic, a, b, scale, offset=7),
    "sigmoid": lambda critic, a, b, scale, bias: contrast.sigmoid(critic, a, b, scale, bias, offset=7),
}


def leaves(critic: Critic, rows: int, columns: int, scale: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(num, 5, generator=generator, dtype=torch.float64) for num in (rows, columns)]
    if critic == "cosine":
        z = [functional.normalize(each, dim=1) for each in z]
    return [*(each.requires_grad_() for each in z), *(torch.tensor(x).double().requires_grad_() for x in (scale, -2.0))]


@pytest.fixture
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Compute in tiles from here on, however small the batch."""

    def start() -> None:
        monkeypatch.setattr(contrast, "DENSE_SCORES", 0)
        monkeypatch.setattr(tiled, "TILE_CPU", 8)
        monkeypatch.setattr(tiled, "LEAST_STRIP", 3)

    return start


def value_and_gradients(compute: Compute, critic: Critic, inputs: list[Tensor]) -> list[Tensor]:
    for each in inputs:
        each.grad = None
    value = compute(critic, *inputs)
    (2.5 * value).backward()
    return [value.detach(), *(torch.zeros_like(each) if each.grad is None else each.grad for each in inputs)]


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("scale", [3.0, 90.0])
@pytest.mark.parametrize("rows", [1, 8, 29])
@pytest.mark.parametrize("name", LOSSES)
def test_tiles_give_the_dense_value_and_gradients(
    name: str, rows: int, scale: float, critic: Critic, in_tiles: Callable[[], None]
) -> None:
    inputs = leaves(critic, rows, rows, scale)
    dense = value_and_gradients(LOSSES[name], critic, inputs)
    in_tiles()
    found = value_and_gradients(LOSSES[name], critic, inputs)
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("name", ACROSS)
def test_so_they_do_for_anchors_against_the_candidates_of_several_processes(
    name: str, critic: Critic, in_tiles: Callable[[], None]
) -> None:
    inputs = leaves(critic, 11, 37)
    dense = value_and_gradients(ACROSS[name], critic, inputs)
    in_tiles()
    found = value_and_gradients(ACROSS[name], critic, inputs)
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences_agree(name: str, critic: Critic, in_tiles: Callable[[], None]) -> None:
    in_tiles()
    inputs = leaves(critic, 11, 11)
    assert torch.autograd.gradcheck(lambda *x: LOSSES[name](critic, *x), inputs)  # pyright: ignore[reportUnknownMemberType, reportUnknownLambdaType, reportUnknownArgumentType]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("held", [0, 1])
def test_a_side_that_is_held_still_gets_no_gradient(name: str, held: int, in_tiles: Callable[[], None]) -> None:
    in_tiles()
    inputs = leaves("cosine", 9, 9)
    inputs[held] = inputs[held].detach()
    value_and_gradients(LOSSES[name], "cosine", inputs)
    assert inputs[held].grad is None
    assert inputs[1 - held].grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients_the_value_is_the_same(name: str, in_tiles: Callable[[], None]) -> None:
    in_tiles()
    inputs = leaves("cosine", 13, 13)
    value = LOSSES[name]("cosine", *inputs)
    with torch.no_grad():
        assert torch.equal(LOSSES[name]("cosine", *inputs), value.detach())


@pytest.mark.parametrize("name", LOSSES)
def test_logits_far_apart_stay_numbers(name: str, in_tiles: Callable[[], None]) -> None:
    """In float32, with scores whose exponentials overflow and vanish."""
    inputs = [each.detach().float().requires_grad_() for each in leaves("dot", 19, 19, 400.0)]
    dense = value_and_gradients(LOSSES[name], "dot", inputs)
    in_tiles()
    found = value_and_gradients(LOSSES[name], "dot", inputs)
    for one, other in zip(found, dense, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_leaves_the_logits_as_exact_as_they_are(name: str, in_tiles: Callable[[], None]) -> None:
    inputs = [each.detach().float().requires_grad_() for each in leaves("cosine", 19, 19)]
    in_tiles()
    plain = value_and_gradients(LOSSES[name], "cosine", inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(LOSSES[name], "cosine", inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_of_the_size_of_the_batch_squared_is_kept(name: str, in_tiles: Callable[[], None]) -> None:
    in_tiles()
    inputs = leaves("squared_distance", 64, 64)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        LOSSES[name]("squared_distance", *inputs)
    assert max(kept) <= 64 * 7


def test_memory_grows_with_the_batch_and_not_with_its_square() -> None:
    """A batch of 16,384 is a GiB of logits; both losses and their gradients take a tenth of it."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[4])!r})
import torch
from worker.learning.losses import contrast
torch.set_num_threads(1)
z = [torch.nn.functional.normalize(torch.randn(16384, 8), dim=1).requires_grad_() for _ in range(2)]
scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
contrast.info_nce("cosine", *(x[:1100] for x in z), scale).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
contrast.info_nce("cosine", *z, scale).backward()
contrast.one_sided_info_nce("cosine", z[0][:2048], z[1], scale, offset=2048).backward()
contrast.sigmoid("squared_distance", *z, scale, bias).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000  # KiB
