"""GELU(x + bias) in one pass: kernel, launch and gradient.

M: rows   H: columns, the intermediate size   P: persistent programs per block of columns

The forward pass moves 4 bytes per element in bf16: it reads x and writes y. The backward pass moves
6: it reads dy and x and writes dx. The bias gradient is the column sum of dx, which persistent
programs keep in registers and write as fp32 [P, H]; torch adds those in a fixed order.

tanh(u) is computed as 2 sigmoid(2u) - 1, because Triton's interpreter has no tanh; small results
also keep their digits this way. Exact GELU has a polynomial of ours in place of `tl.erf`, which
took twice the instructions, so that arithmetic and not memory was the limit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shared import launching, registered, tiles

SQRT_HALF = tl.constexpr(0.7071067811865476)
TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
CUBIC = tl.constexpr(0.044715)

# Columns of a program. At a width of 1248, blocks of 256 waste 2.5% of their columns, and a block
# of 2048 wastes 39%.
MAX_BLOCK = 256


@triton.jit
def one_plus_erf(z: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """1 + erf(z / sqrt(2)): twice the probability that a standard normal variable is below z.

    The error of GELU in fp32 is 1.16 times (inputs of scale 0.1) to 0.4 times (scale 4) what it is
    with erf (RMS), because 1 + erf cancels for negative inputs.
    """
    if ACC == tl.float64:
        return 1.0 + tl.erf(z * SQRT_HALF)
    # `share` = 2^polynomial(|z|) is twice the probability beyond |z|. Among polynomials of degree 8
    # this one has the least error up to |z| = 5, weighted by that probability and |z|^-1/2. Its
    # leading coefficient is negative, so that farther out the share goes on towards 0.
    distance = tl.abs(z)
    log2_share = distance * -2.510766080376925e-06 + 3.691668825922534e-05
    log2_share = log2_share * distance - 1.8005547462962568e-04
    log2_share = log2_share * distance - 1.4107655442785472e-04
    log2_share = log2_share * distance + 7.058489136397839e-03
    log2_share = log2_share * distance - 5.24880550801754e-02
    log2_share = log2_share * distance - 4.592116177082062e-01
    log2_share = log2_share * distance - 1.1511048078536987
    share = tl.exp2(log2_share * distance)
    return tl.where(z < 0.0, share, 2.0 - share)


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    num_rows: tl.tensor,
    TANH: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    # One dimension for rows and columns: CUDA limits the second dimension of a grid to 65,535.
    num_blocks: tl.constexpr = (H + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    first = (program // num_blocks).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)[:, None]
    cols = program % num_blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (first + rows < num_rows) & (cols < H)
    z = tl.load(x_ptr + first * H + rows * H + cols, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(ACC)
    if TANH:
        y = z / (1.0 + tl.exp(-(z * TWICE_SQRT_2_OVER_PI * (z * z * CUBIC + 1.0))))
    else:
        y = 0.5 * z * one_plus_erf(z, ACC)
    tl.store(y_ptr + first * H + rows * H + cols, y, mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dbias_ptr: tl.tensor,
    num_rows: tl.tensor,
    TANH: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    bias = 0.0
    if bias_ptr is not None:
        column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        bias = tiles.load_parameter(bias_ptr, column, H, ACC)
    dbias = tl.zeros((ROWS, BLOCK), ACC)
    # A persistent loop over the row tiles of one block of columns; see layer_norm.py.
    for tile in tl.range(
        tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1), num_stages=STAGES
    ):
        first = tl.cast(tile, tl.int64) * ROWS
        inside = (first + rows < num_rows) & (cols < H)
        at = first * H + rows * H + cols
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC) + bias
        if TANH:
            inner = z * TWICE_SQRT_2_OVER_PI * (z * z * CUBIC + 1.0)
            # sigmoid(inner) and its complement, both from exp(-|inner|): 1 - sigmoid would cancel
            # for large z, where the slope enlarges the error (it is 9 at z = 6).
            small = tl.exp(-tl.abs(inner))
            large = 1.0 / (1.0 + small)
            small = small * large
            slope = (z * z * CUBIC * 3.0 + 1.0) * TWICE_SQRT_2_OVER_PI
            dx = dy * (tl.where(inner >= 0.0, large, small) + z * small * large * slope)
        else:
            density = tl.exp2(z * z * -HALF_LOG2_E) * INVERSE_SQRT_2_PI
            dx = dy * (0.5 * one_plus_erf(z, ACC) + z * density)
        tl.store(dx_ptr + at, dx, mask=inside)
        dbias += dx
    if dbias_ptr is not None:
        # A row of partial sums for each program; `backward` adds up the rows.
        partial = tl.program_id(1) * H + cols
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0, keep_dims=True), mask=cols < H)


@cache
def tile_of(width: int) -> tiles.Tile:
    """2048 elements on 4 warps, 16 per thread, in blocks of at most 256 columns."""
    block = max(tiles.DRAWS, min(MAX_BLOCK, tiles.next_power_of_2(width)))
    return tiles.Tile(2048 // block, block, 4)


_forward = launching.Launcher(forward_kernel)
_backward = launching.Launcher(backward_kernel)


def forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """GELU(x + bias), like x."""
    y = _output(x, bias, tanh)
    num_rows, width = registered.matrix_shape(x)
    if num_rows:
        tile = tiles.for_device(tile_of(width), x, num_rows)
        _forward(
            (tiles.cdiv(width, tile.block) * tiles.cdiv(num_rows, tile.rows),),
            (x.contiguous(), bias, y),
            (num_rows,),
            (tanh, width, tile.rows, tile.block, tiles.accumulator(x.dtype)),
            tile.num_warps,
        )
    return y


def _output(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return registered.empty_like(x)


def backward(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """(dx like x, dbias [H] in fp32 or empty)."""
    dx, dbias = _gradients(dy, x, bias, tanh)
    num_rows, width = registered.matrix_shape(x)
    if not num_rows:
        return dx, dbias.zero_()
    tile = tiles.for_device(tile_of(width), x, num_rows)
    num_blocks = tiles.cdiv(width, tile.block)
    num_tiles = tiles.cdiv(num_rows, tile.rows)
    all_programs = tiles.num_persistent(x, num_tiles * num_blocks, tile)
    num_programs = min(num_tiles, tiles.cdiv(all_programs, num_blocks))
    partials = None if bias is None else dbias.new_empty((num_programs, width))
    _backward(
        (num_blocks, num_programs),
        (dy.contiguous(), x.contiguous(), bias, dx, partials),
        (num_rows,),
        (tanh, width, tile.rows, tile.block, tiles.accumulator(x.dtype), tiles.STAGES),
        tile.num_warps,
    )
    if partials is not None:
        torch.sum(partials, dim=0, out=dbias)
    return dx, dbias


def _gradients(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    width = 0 if bias is None else x.shape[-1]
    dtype = tiles.statistics_dtype(x.dtype)
    return (
        registered.empty_like(x),
        torch.empty(width, dtype=dtype, device=x.device),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _formula(launch: registered.Launch) -> Any:
    def differentiate(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        if dy is None:
            return None, None, None
        x, bias = ctx.saved_tensors
        dx, dbias = launch(dy, x, bias, ctx.tanh)
        return dx, None if bias is None else dbias.to(bias.dtype), None

    return differentiate


_call = registered.define(
    "bias_gelu", forward, _output, _setup_context, backward, _gradients, _formula
)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """See `clue_ds.kernels.bias_gelu`."""
    return _call(x, bias, approximate == "tanh")
