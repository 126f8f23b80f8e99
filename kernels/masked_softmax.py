"""dropout(softmax(scale * scores + mask)): kernel, launch and gradient.

B: sequences   N: heads   Q, K: query and key positions   M: rows, B x N x Q

The forward pass moves 4 bytes per element in bf16: it reads scores and writes probabilities. With
dropout it moves 6, as the probabilities before dropout are kept too. The backward pass moves 6: it
reads them and dy, and writes dscores; the dropout mask is drawn again. A mask is read through its
strides, so one of [B, 1, 1, K] is never expanded.

A row whose keys are all masked is zeros and has zero gradients. A NaN that is not masked reaches
the whole row: nothing here tests for NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .shared import launching, registered, tiles


@triton.jit
def forward_kernel(
    scores_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    out_ptr: tl.tensor,
    dropped_ptr: tl.tensor,
    num_rows: tl.tensor,
    mask_stride_b: tl.tensor,
    mask_stride_n: tl.tensor,
    mask_stride_q: tl.tensor,
    N: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    MASK_STRIDE_K: tl.constexpr,
    IS_BOOL: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows)[:, None] & (cols < K)
    local = tl.arange(0, ROWS)[:, None] * K + cols
    scores = tl.load(scores_ptr + first * K + local, mask=inside, other=0.0).to(ACC) * SCALE
    # What is outside becomes -inf after the load. Key lengths follow further down, not in the
    # load's mask: a length known only at run time there would make the load scalar.
    scores = tl.where(cols < K, scores, float("-inf"))
    if mask_ptr is not None:
        b, n, q = rows // (N * Q), rows // Q % N, rows % Q
        at = b * mask_stride_b + n * mask_stride_n + q * mask_stride_q
        mask = tl.load(mask_ptr + at[:, None] + cols * MASK_STRIDE_K, mask=inside, other=0)
        if IS_BOOL:
            scores = tl.where(mask != 0, float("-inf"), scores)
        else:
            scores += mask.to(ACC)
    if lengths_ptr is not None:
        lengths = tl.load(lengths_ptr + rows // (N * Q), mask=rows < num_rows, other=0)
        scores = tl.where(cols < lengths[:, None], scores, float("-inf"))
    # The maximum is taken after masking: a huge masked score would make all others underflow.
    largest = tl.max(scores, axis=1)
    # Where every key is masked, -inf - (-inf) and 0 / 0 would be NaN. With a maximum of 0 the
    # weights are exp(-inf) = 0, and divided by 1 they stay zeros.
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp(scores - largest[:, None])
    total = tl.sum(weights, axis=1)
    probabilities = weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    tl.store(out_ptr + first * K + local, probabilities, mask=inside)
    if NUM_DROPPED > 0:
        keep = tiles.keep_tile(tl.load(seed_ptr), first, NUM_DROPPED, ROWS, BLOCK)
        dropped = tl.where(keep, probabilities * KEEP_SCALE, 0.0)
        tl.store(dropped_ptr + first * K + local, dropped, mask=inside)


@triton.jit
def backward_kernel(
    dy_ptr: tl.tensor,
    out_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    dscores_ptr: tl.tensor,
    num_rows: tl.tensor,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = first + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows)[:, None] & (cols < K)
    local = tl.arange(0, ROWS)[:, None] * K + cols
    dy = tl.load(dy_ptr + first * K + local, mask=inside, other=0.0).to(ACC)
    probabilities = tl.load(out_ptr + first * K + local, mask=inside, other=0.0).to(ACC)
    if NUM_DROPPED > 0:
        keep = tiles.keep_tile(tl.load(seed_ptr), first, NUM_DROPPED, ROWS, BLOCK)
        dy = tl.where(keep, dy * KEEP_SCALE, 0.0)
    projected = tl.sum(dy * probabilities, axis=1)
    dscores = probabilities * (dy - projected[:, None]) * SCALE
    tl.store(dscores_ptr + first * K + local, dscores, mask=inside)


_forward = launching.Launcher(forward_kernel)
_backward = launching.Launcher(backward_kernel)


def forward(
    scores: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """scores [B, N, Q, K] -> (probabilities, the same after dropout or empty)."""
    out, dropped = _outputs(scores, mask, key_lengths, seed, scale, p)
    num_dropped, keep_scale = reference.dropout_threshold(p)
    _, num_heads, num_queries, num_keys = scores.shape
    num_rows = out.numel() // num_keys
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.expand(scores.shape)
        strides = mask.stride()
    if num_rows:
        tile = tiles.for_device(tiles.forward_tile(num_keys), scores, num_rows)
        is_bool = mask is not None and mask.dtype == torch.bool
        _forward(
            (tiles.cdiv(num_rows, tile.rows),),
            (scores.contiguous(), mask, key_lengths, seed, out, dropped if p > 0.0 else None),
            (num_rows, *strides[:3]),
            (
                num_heads, num_queries, num_keys, strides[3], is_bool, scale, num_dropped,
                keep_scale, tile.rows, tile.block, tiles.accumulator(scores.dtype),
            ),
            tile.num_warps,
        )  # fmt: skip
    return out, dropped


def _outputs(
    scores: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    return (
        registered.empty_like(scores),
        registered.empty_like(scores) if p > 0.0 else scores.new_empty(0),
    )


def backward(dy: Tensor, out: Tensor, seed: Tensor | None, scale: float, p: float) -> Tensor:
    """dscores like `out`, the probabilities before dropout."""
    dscores = _gradients(dy, out, seed, scale, p)
    num_keys = out.shape[-1]
    num_rows = out.numel() // num_keys
    num_dropped, keep_scale = reference.dropout_threshold(p)
    if num_rows:
        tile = tiles.for_device(tiles.forward_tile(num_keys), out, num_rows)
        _backward(
            (tiles.cdiv(num_rows, tile.rows),),
            (dy.contiguous(), out, seed, dscores),
            (num_rows,),
            (
                num_keys, scale, num_dropped, keep_scale, tile.rows, tile.block,
                tiles.accumulator(out.dtype),
            ),
            tile.num_warps,
        )  # fmt: skip
    return dscores


def _gradients(dy: Tensor, out: Tensor, seed: Tensor | None, scale: float, p: float) -> Tensor:
    return registered.empty_like(out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, seed, scale, p = inputs
    ctx.save_for_backward(output[0], seed)
    ctx.options = (scale, p)


def _formula(launch: registered.Launch) -> Any:
    def differentiate(ctx: Any, dout: Tensor | None, ddropped: Tensor | None) -> tuple[Any, ...]:
        # With dropout only the dropped probabilities are a result, without it only the others.
        dy = ddropped if ctx.options[1] > 0.0 else dout
        if dy is None:
            return (None,) * 6
        out, seed = ctx.saved_tensors
        return launch(dy, out, seed, *ctx.options), None, None, None, None, None

    return differentiate


_call = registered.define(
    "masked_softmax", forward, _outputs, _setup_context, backward, _gradients, _formula
)


def masked_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """See `clue_ds.kernels.masked_softmax`."""
    p = dropout_p if training else 0.0
    seeded = registered.fresh_seed(seed, scores.device) if p > 0.0 else None
    # Scores of fewer than the four dimensions [B, N, Q, K] get the missing ones in front.
    four = scores.reshape((1,) * (4 - scores.dim()) + scores.shape)
    out, dropped = _call(four, mask, key_lengths, seeded, float(scale), float(p))
    return (dropped if p > 0.0 else out).reshape(scores.shape)
