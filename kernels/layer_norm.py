"""LayerNorm over rows: kernel, launch and gradient.

M: rows   H: hidden size   P: persistent programs of the backward pass

The forward pass moves 4 bytes per element in bf16: it reads x and writes y, and keeps mean and rstd
in fp32, 8 bytes per row. The backward pass moves 6: it reads dy and x and writes dx. P persistent
programs sum dweight and dbias in registers and write them once, as fp32 [P, H]; torch then adds
those in a fixed order. That is deterministic, and takes a fifth or less of the time of atomics
(others' measurements).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import launching, normalization, registered, tiles


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    num_rows: tl.tensor,
    EPS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * ROWS
    x = tiles.load_rows(x_ptr, first, num_rows, H, ROWS, BLOCK, TAIL, ACC)
    normalization.store(
        x, weight_ptr, bias_ptr, None, y_ptr, statistics_ptr, first, num_rows,
        EPS, 0, 1.0, H, ROWS, BLOCK, TAIL, ACC,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    num_rows: tl.tensor,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    weight = tiles.load_columns(weight_ptr, H, BLOCK, TAIL, ACC)
    dweight = tiles.no_sums(ROWS, BLOCK, TAIL, ACC)
    dbias = tiles.no_sums(ROWS, BLOCK, TAIL, ACC)
    # A persistent program: it takes every n-th tile, where n is the number of programs, so that its
    # column sums stay in registers over many rows and are written once, below. Of Triton's loops,
    # only `tl.range` with two stages or more loads the next tiles while this one is reduced.
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        first = tl.cast(tile, tl.int64) * ROWS
        dy = tiles.load_rows(dy_ptr, first, num_rows, H, ROWS, BLOCK, TAIL, ACC)
        x = tiles.load_rows(x_ptr, first, num_rows, H, ROWS, BLOCK, TAIL, ACC)
        dx, dweight, dbias = normalization.gradient(
            dy, x, weight, statistics_ptr, first, num_rows, dweight, dbias, H, ROWS
        )
        tiles.store_rows(dx_ptr, dx, first, num_rows, H, ROWS, BLOCK, TAIL)
    # A row of partial sums for each program; `backward` adds up the rows. No atomics.
    tiles.store_sums(partials_ptr, 0, dweight, H, BLOCK, TAIL)
    tiles.store_sums(partials_ptr, 1, dbias, H, BLOCK, TAIL)


_forward = launching.Launcher(forward_kernel)
_backward = launching.Launcher(backward_kernel)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(y like x, statistics [2, M]: mean and rstd)."""
    y, statistics = _outputs(x, weight, bias, eps)
    num_rows, width = registered.matrix_shape(x)
    if num_rows:
        tile = tiles.for_device(tiles.row_tile(width), x, num_rows)
        _forward(
            (tiles.cdiv(num_rows, tile.rows),),
            (x.contiguous(), weight, bias, y, statistics),
            (num_rows,),
            (eps, width, *tile.constants, tiles.accumulator(x.dtype)),
            tile.num_warps,
        )
    return y, statistics


def _outputs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    statistics = tiles.statistics_dtype(x.dtype)
    num_rows, _ = registered.matrix_shape(x)
    return (
        registered.empty_like(x),
        torch.empty((2, num_rows), dtype=statistics, device=x.device),
    )


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx like x, parameter gradients [2, H] in fp32: dweight and dbias)."""
    dx, parameters = _gradients(dy, x, weight, bias, statistics)
    num_rows, width = registered.matrix_shape(x)
    if not num_rows:
        return dx, parameters.zero_()
    tile = tiles.for_device(tiles.backward_tile(width), x, num_rows)
    num_programs = tiles.num_persistent(x, tiles.cdiv(num_rows, tile.rows), tile)
    partials = parameters.new_empty((2, num_programs, width))
    _backward(
        (num_programs,),
        (dy.contiguous(), x.contiguous(), weight, statistics, dx, partials),
        (num_rows,),
        (width, *tile.constants, tiles.accumulator(x.dtype), tiles.STAGES),
        tile.num_warps,
    )
    torch.sum(partials, dim=1, out=parameters)
    return dx, parameters


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        registered.empty_like(x),
        torch.empty((2, x.shape[-1]), dtype=statistics.dtype, device=x.device),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    # The parameters themselves, not copies: ZeRO-3 frees their data after the forward pass and
    # gathers it again before the backward pass.
    ctx.save_for_backward(x, weight, bias, output[1])


def _formula(launch: registered.Launch) -> Any:
    def differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return None, None, None, None
        x, weight, bias, statistics = ctx.saved_tensors
        dx, parameters = launch(dy, x, weight, bias, statistics)
        dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        return dx, *registered.parameter_gradients(parameters, dtypes), None

    return differentiate


_call = registered.define(
    "layer_norm", forward, _outputs, _setup_context, backward, _gradients, _formula
)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """See `clue_ds.kernels.layer_norm`."""
    return _call(x, weight, bias, eps)[0]
