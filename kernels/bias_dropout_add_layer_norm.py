"""LayerNorm(residual + dropout(x + bias)) in one pass: kernel, launch and gradient.

M: rows   H: hidden size   P: persistent programs of the backward pass

The forward pass moves 8 bytes per element in bf16: it reads x and residual, and writes y and the
sum that LayerNorm normalized. The backward pass reads that sum, and pre-LN networks pass it on to
the next block. The backward pass moves 8 bytes: it reads dy and the sum, and writes dx and
dresidual. Without dropout those two are one tensor (6 bytes); a gradient of the sum adds 2. The
dropout mask is drawn again from its seed. Gradients of bias, weight and ln_bias are reduced as in
layer_norm.py.

Rejected: saving y and no sum (6 bytes), because computing the sum from y divides by the weights,
which may be 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .shared import launching, normalization, registered, tiles


@triton.jit
def forward_kernel(
    x_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    ln_bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    num_rows: tl.tensor,
    EPS: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    z = ()
    # Each segment goes through all steps before the next begins; taking every step for all segments
    # would need 112 registers at 312 columns.
    for i in tl.static_range(2 if TAIL else 1):
        cols = tiles.columns(i, BLOCK, TAIL)
        inside = (rows < num_rows)[:, None] & (cols < H)
        at = first * H + (tl.arange(0, ROWS)[:, None] * H + cols)
        value = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(ACC)
        if NUM_DROPPED > 0:
            keep = tiles.keep_tile(
                tl.load(seed_ptr),
                first,
                NUM_DROPPED,
                ROWS,
                TAIL if i else BLOCK,
                i * BLOCK,
            )
            value = tl.where(keep, value * KEEP_SCALE, 0.0)
            if mask_ptr is not None:
                tl.store(mask_ptr + at, keep, mask=inside)
        if residual_ptr is not None:
            value += tl.load(residual_ptr + at, mask=inside, other=0.0).to(ACC)
        # Statistics are taken of the sum as it is stored, rounded, since that is what the backward
        # pass reads. Those of the unrounded sum would not be its mean and rstd, and a row of nearly
        # equal numbers has an rstd of up to 1e6.
        kept = value.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, kept, mask=inside)
        z += (kept.to(ACC),)
    normalization.store(
        z, weight_ptr, ln_bias_ptr, None, y_ptr, statistics_ptr, first, num_rows,
        EPS, 0, 1.0, H, ROWS, BLOCK, TAIL, ACC,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    dy_ptr: tl.tensor,
    dsum_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    dresidual_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    num_rows: tl.tensor,
    HAS_BIAS: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    seed = 0
    if NUM_DROPPED > 0:
        seed = tl.load(seed_ptr)  # before the loop, which would prefetch it for every tile
    weight = tiles.load_columns(weight_ptr, H, BLOCK, TAIL, ACC)
    dbias = tiles.no_sums(ROWS, BLOCK, TAIL, ACC)
    dweight = tiles.no_sums(ROWS, BLOCK, TAIL, ACC)
    dln_bias = tiles.no_sums(ROWS, BLOCK, TAIL, ACC)
    # A persistent loop, as in layer_norm.py: every n-th tile, prefetched, with sums in registers.
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        first = tl.cast(tile, tl.int64) * ROWS
        dy = tiles.load_rows(dy_ptr, first, num_rows, H, ROWS, BLOCK, TAIL, ACC)
        z = tiles.load_rows(sum_ptr, first, num_rows, H, ROWS, BLOCK, TAIL, ACC)
        dz, dweight, dln_bias = normalization.gradient(
            dy, z, weight, statistics_ptr, first, num_rows, dweight, dln_bias, H, ROWS
        )
        if dsum_ptr is not None:
            dsum = tiles.load_rows(dsum_ptr, first, num_rows, H, ROWS, BLOCK, TAIL, ACC)
            dz = tiles.add(dz, dsum)
        # dz is the residual's gradient; x's is the same after dropout. Where there is no dropout,
        # dx serves for both and dresidual_ptr is None.
        if dresidual_ptr is not None:
            tiles.store_rows(dresidual_ptr, dz, first, num_rows, H, ROWS, BLOCK, TAIL)
        if NUM_DROPPED > 0:
            # The mask of the forward pass, drawn again: it depends on seed, row and column only, so
            # that the two passes may have different tiles.
            dz = tiles.dropout(dz, seed, first, NUM_DROPPED, KEEP_SCALE, ROWS, BLOCK, TAIL)
        tiles.store_rows(dx_ptr, dz, first, num_rows, H, ROWS, BLOCK, TAIL)
        if HAS_BIAS:
            dbias = tiles.add(dbias, dz)
    if HAS_BIAS:
        tiles.store_sums(partials_ptr, 0, dbias, H, BLOCK, TAIL)
    tiles.store_sums(partials_ptr, 1, dweight, H, BLOCK, TAIL)
    tiles.store_sums(partials_ptr, 2, dln_bias, H, BLOCK, TAIL)


_forward = launching.Launcher(forward_kernel)
_backward = launching.Launcher(backward_kernel)


def forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    sum_dtype: torch.dtype,
    wants_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y like x, sum like x in `sum_dtype`, bool mask like x or empty, statistics [2, M])."""
    outputs = _outputs(x, bias, residual, weight, ln_bias, seed, p, eps, sum_dtype, wants_mask)
    y, total, mask, statistics = outputs
    num_rows, width = registered.matrix_shape(x)
    num_dropped, scale = reference.dropout_threshold(p)
    if wants_mask and not num_dropped:
        mask.fill_(True)
    if num_rows:
        tile = tiles.for_device(tiles.row_tile(width), x, num_rows)
        _forward(
            (tiles.cdiv(num_rows, tile.rows),),
            (
                x.contiguous(), bias, None if residual is None else residual.contiguous(), weight,
                ln_bias, seed, y, total, mask if wants_mask else None, statistics,
            ),
            (num_rows,),
            (eps, num_dropped, scale, width, *tile.constants, tiles.accumulator(x.dtype)),
            tile.num_warps,
        )  # fmt: skip
    return outputs


def _outputs(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    sum_dtype: torch.dtype,
    wants_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, _ = registered.matrix_shape(x)
    statistics = tiles.statistics_dtype(x.dtype)
    return (
        registered.empty_like(x),
        torch.empty(x.shape, dtype=sum_dtype, device=x.device),
        torch.empty(x.shape if wants_mask else (0,), dtype=torch.bool, device=x.device),
        torch.empty((2, num_rows), dtype=statistics, device=x.device),
    )


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    statistics: Tensor,
    p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual or empty, parameter gradients [3, H]: dbias, dweight, dln_bias).

    dresidual is empty where there is no residual or where it would equal dx.
    """
    dx, dresidual, parameters = outputs = _gradients(
        dy, dsum, total, weight, seed, statistics, p, x_dtype, residual_dtype, has_bias
    )
    num_rows, width = registered.matrix_shape(total)
    if not num_rows:
        parameters.zero_()
        return outputs
    num_dropped, scale = reference.dropout_threshold(p)
    tile = tiles.for_device(tiles.backward_tile(width, num_sums=3), total, num_rows)
    num_programs = tiles.num_persistent(total, tiles.cdiv(num_rows, tile.rows), tile)
    partials = parameters.new_empty((3, num_programs, width))
    _backward(
        (num_programs,),
        (
            dy.contiguous(), None if dsum is None else dsum.contiguous(), total,
            weight, seed, statistics, dx, dresidual if dresidual.numel() else None, partials,
        ),
        (num_rows,),
        (
            has_bias, num_dropped, scale, width, *tile.constants, tiles.accumulator(x_dtype),
            tiles.STAGES,
        ),
        tile.num_warps,
    )  # fmt: skip
    if has_bias:
        torch.sum(partials, dim=1, out=parameters)
    else:  # the first is unwritten
        torch.sum(partials[1:], dim=1, out=parameters[1:])
    return outputs


def _gradients(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    statistics: Tensor,
    p: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    is_own = residual_dtype is not None and (p > 0.0 or residual_dtype != x_dtype)
    device = total.device
    return (
        torch.empty(total.shape, dtype=x_dtype, device=device),
        torch.empty(total.shape if is_own else (0,), dtype=residual_dtype, device=device),
        torch.empty((3, total.shape[-1]), dtype=statistics.dtype, device=device),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, bias, residual, weight, ln_bias, seed, p, *_ = inputs
    _, total, _, statistics = output
    ctx.save_for_backward(total, weight, seed, statistics)
    ctx.options = (p, x.dtype, None if residual is None else residual.dtype, bias is not None)
    ctx.dtypes = (None if bias is None else bias.dtype, weight.dtype, ln_bias.dtype)


def _formula(launch: registered.Launch) -> Any:
    def differentiate(ctx: Any, dy: Tensor | None, dsum: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dy is None and dsum is None:
            return (None,) * 10
        total, weight, seed, statistics = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(total)
        dx, dresidual, parameters = launch(dy, dsum, total, weight, seed, statistics, *ctx.options)
        has_residual = ctx.options[2] is not None
        if has_residual and not dresidual.numel():
            dresidual = dx
        dbias, *others = registered.parameter_gradients(parameters, ctx.dtypes)
        residual = dresidual if has_residual else None
        return dx, dbias, residual, *others, None, None, None, None, None

    return differentiate


_call = registered.define(
    "bias_dropout_add_layer_norm",
    forward,
    _outputs,
    _setup_context,
    backward,
    _gradients,
    _formula,
)


def bias_dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    p: float,
    eps: float,
    training: bool,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    seed: Tensor | int | None = None,
    return_mask: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `clue_ds.kernels.bias_dropout_add_layer_norm`."""
    p = p if training else 0.0
    seeded = registered.fresh_seed(seed, x.device) if p > 0.0 else None
    sum_dtype = reference.sum_dtype(x, residual, residual_in_fp32)
    y, total, mask, _ = _call(
        x, bias, residual, weight, ln_bias, seeded, p, eps, sum_dtype, return_mask
    )
    results = (y, *([total] if prenorm else []), *([mask] if return_mask else []))
    return results if len(results) > 1 else y
