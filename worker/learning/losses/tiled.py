"""In-batch losses without the batch-by-batch matrix: logits are made a tile at a time, forward and backward.

Here the logits are plain inner products of two sets of vectors; scale and critic are folded into the vectors before, so
their gradients are autograd's. A step needs memory for one tile and for the gradients of the vectors: linear in the
batch. Nothing is summed in an order that depends on the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, cast, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

TILE_CPU: Final = 768  # rows and columns: 2.25 MiB, of which what two cores share stays in their nearest caches
TILE_DEVICE: Final = 8192  # 256 MiB, enough work for a device at a time
LEAST_STRIP: Final = 128  # rows of a strip over all columns
SMALL: Final = 60.0  # e^60 and e^-60, summed over any batch, divide each other without a loss in float32
LINEAR_FROM: Final = 40.0  # softplus(x) is x from here on, in float64 too; PyTorch takes it for that from 20 on
LOG_NOTHING: Final = -60.0  # e^-60 is lost beside 1 in float64 too; far below it numbers are denormal, and CPUs slow


def symmetric_info_nce(
    a: Float[Tensor, "batch inner"], b: Float[Tensor, "batch inner"], *, is_small: bool = False
) -> Float[Tensor, ""]:
    """Compute InfoNCE over logits <a_i, b_j>, the mean of both directions, row i of both being one pair.

    `is_small` promises that no logit is beyond -`SMALL` and `SMALL`.
    """
    return cast("Tensor", _Symmetric.apply(a, b, is_small))


def one_sided_info_nce(
    a: Float[Tensor, "anchor inner"], b: Float[Tensor, "candidate inner"], offset: int
) -> Float[Tensor, ""]:
    """Compute the mean over anchors of -log softmax_j <a_i, b_j> at their positive, j = i + offset."""
    return cast("Tensor", _OneSided.apply(a, b, offset, torch.is_grad_enabled()))


def sigmoid_sum(
    a: Float[Tensor, "anchor inner"], b: Float[Tensor, "candidate inner"], bias: Float[Tensor, ""], offset: int
) -> Float[Tensor, ""]:
    """Compute the mean over anchors of sum_j softplus(-y_ij (<a_i, b_j> + bias)), y = 1 at j = i + offset, else -1."""
    return cast("Tensor", _Sigmoid.apply(a, b, bias, offset, torch.is_grad_enabled()))


@final
class _Symmetric(torch.autograd.Function):
    """Two passes, four matrix products: the softmax of columns is known only after all rows were seen.

    Where the logits are small, e^logit serves both directions as it is; else each direction takes its largest logits
    off before, as one must.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, is_small: bool) -> Tensor:  # noqa: FBT001
        ctx.is_small = is_small
        if is_small:
            row_sums, column_sums = a.new_zeros(len(a)), a.new_zeros(len(b))
            for rows, columns, tile, _ in _tiles(a, b):
                tile.exp_()
                row_sums[rows] += tile.sum(1)
                column_sums[columns] += tile.sum(0)
            row_sums.log_()
            column_sums.log_()
        else:
            row_sums, column_sums = a.new_full((len(a),), -torch.inf), a.new_full((len(b),), -torch.inf)
            for rows, columns, tile, spare in _tiles(a, b):
                row_sums[rows] = torch.logaddexp(row_sums[rows], _log_sum_exp(tile, 1, spare))
                column_sums[columns] = torch.logaddexp(column_sums[columns], _log_sum_exp(tile, 0, spare))
        ctx.save_for_backward(a, b, row_sums, column_sums)
        return (row_sums.mean() + column_sums.mean()) / 2 - (a * b).sum(1).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, row_sums, column_sums = cast("tuple[Tensor, ...]", ctx.saved_tensors)
        sums = _Sums(ctx, a, b)
        row_shares, column_shares = (-row_sums).exp_(), (-column_sums).exp_()
        for rows, columns, tile, spare in _tiles(a, b):
            if ctx.is_small:
                torch.add(row_shares[rows, None], column_shares[columns], out=spare).mul_(tile.exp_())
            else:
                _exp_(torch.sub(tile, column_sums[columns], out=spare)).add_(_exp_(tile.sub_(row_sums[rows, None])))
            sums.add(rows, columns, spare)
        sums.subtract_positives(2.0, offset=0)
        return *sums.times(grad / (2 * len(a))), None


@final
class _OneSided(torch.autograd.Function):
    """One pass over strips that hold all candidates of their anchors, three matrix products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offset: int, wants_grad: bool) -> Tensor:  # noqa: FBT001
        sums = _Sums(ctx, a, b) if wants_grad else None
        total = a.new_zeros(())
        strip = max(LEAST_STRIP, _tile_size(a) ** 2 // len(b))
        for rows, columns, tile, spare in _tiles(a, b, strip, len(b)):
            row_sums = _log_sum_exp(tile, 1, spare)
            total += row_sums.sum()
            if sums is not None:
                sums.add(rows, columns, _exp_(tile.sub_(row_sums[:, None])))
        if sums is not None:
            sums.subtract_positives(1.0, offset)
            sums.save(ctx, 1 / len(a))
        return (total - (a * b[offset : offset + len(a)]).sum()) / len(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(None if saved is None else saved * grad for saved in ctx.saved_tensors), None, None


@final
class _Sigmoid(torch.autograd.Function):
    """One pass, three matrix products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor, offset: int, wants_grad: bool) -> Tensor:  # noqa: FBT001, PLR0917
        sums = _Sums(ctx, a, b) if wants_grad else None
        total, grad_bias = a.new_zeros(()), a.new_zeros(())
        for rows, columns, tile, _ in _tiles(a, b):
            tile.add_(bias).clamp_(min=LOG_NOTHING)
            total += functional.softplus(tile, threshold=LINEAR_FROM).sum()
            if sums is not None:
                weights = tile.sigmoid_()
                grad_bias += weights.sum()
                sums.add(rows, columns, weights)
        # softplus(-x) = softplus(x) - x at the positives
        total -= (a * b[offset : offset + len(a)]).sum() + len(a) * bias
        if sums is not None:
            sums.subtract_positives(1.0, offset)
            sums.save(ctx, 1 / len(a), grad_bias / len(a) - 1)
        return total / len(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *(None if saved is None else saved * grad for saved in ctx.saved_tensors), None, None


@final
class _Sums:
    """The gradients of both sides while the tiles go by; nothing for a side that needs none."""

    def __init__(self, ctx: FunctionCtx, a: Tensor, b: Tensor) -> None:
        needs = cast("tuple[bool, ...]", ctx.needs_input_grad)  # pyright: ignore[reportAttributeAccessIssue]
        self._a, self._b = a, b
        self._grad_a = torch.zeros_like(a) if needs[0] else None
        self._grad_b = torch.zeros_like(b) if needs[1] else None

    def add(self, rows: slice, columns: slice, weights: Float[Tensor, "row column"]) -> None:
        """Add what the derivatives by a tile's logits say."""
        if self._grad_a is not None:
            self._grad_a[rows].addmm_(weights, self._b[columns])
        if self._grad_b is not None:
            self._grad_b[columns].addmm_(weights.T, self._a[rows])

    def subtract_positives(self, weight: float, offset: int) -> None:
        """Add the derivative by the logits of the positives."""
        positives = slice(offset, offset + len(self._a))
        if self._grad_a is not None:
            self._grad_a.sub_(self._b[positives], alpha=weight)
        if self._grad_b is not None:
            self._grad_b[positives].sub_(self._a, alpha=weight)

    def times(self, factor: Tensor | float) -> tuple[Tensor | None, Tensor | None]:
        """Return both gradients, multiplied."""
        return (
            None if self._grad_a is None else self._grad_a.mul_(factor),
            None if self._grad_b is None else self._grad_b.mul_(factor),
        )

    def save(self, ctx: FunctionCtx, factor: float, *more: Tensor) -> None:
        """Keep the gradients, multiplied, for the way back."""
        ctx.save_for_backward(*self.times(factor), *more)  # pyright: ignore[reportArgumentType]  # it takes None


def _exp_(tile: Tensor) -> Tensor:
    return tile.clamp_(min=LOG_NOTHING).exp_()


def _log_sum_exp(tile: Tensor, dim: int, spare: Tensor) -> Tensor:
    largest = tile.amax(dim, keepdim=True)
    return _exp_(torch.sub(tile, largest, out=spare)).sum(dim).log_() + largest.squeeze(dim)


def _tile_size(a: Tensor) -> int:
    return TILE_CPU if a.device.type == "cpu" else TILE_DEVICE


def _tiles(
    a: Float[Tensor, "row inner"], b: Float[Tensor, "column inner"], height: int | None = None, width: int | None = None
) -> Iterator[tuple[slice, slice, Float[Tensor, "row column"], Float[Tensor, "row column"]]]:
    """Yield the logits of each tile and room for as many, in memory that is written over by the next."""
    height, width = min(height or _tile_size(a), len(a)), min(width or _tile_size(a), len(b))
    memory = a.new_empty(2, height * width)
    for top in range(0, len(a), height):
        rows = slice(top, min(top + height, len(a)))
        for left in range(0, len(b), width):
            columns = slice(left, min(left + width, len(b)))
            shape = rows.stop - rows.start, columns.stop - columns.start
            tile, spare = memory[:, : shape[0] * shape[1]].unflatten(1, shape)
            torch.mm(a[rows], b[columns].T, out=tile)  # autocast leaves alone what writes into a given tensor
            yield rows, columns, tile, spare
