"""Attention over packed sequences of any lengths: launches, gradients and registration.

T: tokens   R: queries   S: sequences   N: heads   D: head size

Scores are never in memory: the forward pass reads q, k, v and writes the result and lse, the
logarithm of each query's sum of exponentials, in fp32. The backward pass computes the
probabilities from lse again. It draws the dropout mask again too, a function of seed, row (query
and head) and column (the key's position in its sequence); see shared/tiles.py. The kernels are in
shared/packed_attention.py.

Guarantees: there are no atomics, so gradients have the same bits every time. One kernel makes dq
and one makes dk and dv, straight into the places of one packed gradient. A query without keys gets
zeros, and so does the gradient of a key without queries. Nothing here waits for the GPU.

The grid has a program for every block of the longest sequence, every head and every sequence; a
program beyond the end of its sequence stops after reading two offsets, so a spare sequence costs
its launches only: an estimated nanosecond for each program.

Rejected: tiles that run on over the ends of sequences, which would need no programs for spare
sequences. A mask drawn by position in the sequence then starts anywhere within the 32 columns that
four Philox counters serve. Scores of dk and dv as [keys, queries], which would leave them in
registers for the products that follow: the mask would be transposed through shared memory instead,
for 33 instructions per score instead of 24. Padding the head size in memory: 26 made 32, with the
copies that slice it off again, costs a sixth of a block's traffic; here it is padded in registers.
Strides as run-time numbers: a token's 936 elements are not divisible by 16, so loads would be 2
bytes wide.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import reference
from .backend import INTERPRETED
from .shared import launching, packed_attention, registered, tiles

MAX_HEAD_SIZE = 64  # of the kernels; a larger or odd one takes the reference


class Blocks(NamedTuple):
    """Shape of a program: a tile of `queries` x `keys` scores on `num_warps` warps.

    `stages` tiles of the side that it goes through are in memory at once: all but one of them are
    being loaded. Dropout draws for 32 keys at a time, so `keys` is a multiple of 32.
    """

    queries: int
    keys: int
    num_warps: int
    stages: int


class Tiles(NamedTuple):
    """The blocks of the three kernels."""

    forward: Blocks
    dq: Blocks
    dkv: Blocks


# By the columns of a tile, see `padded_head_size`. The fastest on an H200 of those in
# benchmarks/results/gpu_h200.json: small ones, of which many share a multiprocessor.
HOPPER_TILES = {
    32: Tiles(Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(64, 64, 4, 3)),
    64: Tiles(Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3)),
}
# Not measured: the largest that spill nowhere on sm_80 and gfx942.
TILES = Tiles(*[Blocks(64, 32, 4, 2)] * 3)
# fp32 and fp64 have no tensor cores that keep their digits, and the multiplications of a product
# are unrolled, four times as many in a tile of 64 x 64.
WIDE_TILES = Tiles(*[Blocks(32, 32, 4, 2)] * 3)
# The interpreter takes as long for a small tile as for a large one.
INTERPRETED_TILES = Tiles(*[Blocks(64, 64, 4, 2)] * 3)


@cache
def tiles_of(device: torch.device, dtype: torch.dtype, head_size: int) -> Tiles:
    """The tiles for activations of `dtype` on `device`; in the interpreter large ones for all."""
    if INTERPRETED:
        return INTERPRETED_TILES
    if dtype.itemsize > 2:
        return WIDE_TILES
    # sm_90 and sm_100 multiply out of shared memory, which leaves registers.
    is_hopper = not torch.version.hip and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return HOPPER_TILES[max(32, padded_head_size(head_size))] if is_hopper else TILES


def padded_head_size(size: int) -> int:
    """The columns of a tile: 16 are the fewest of a product on tensor cores."""
    return max(16, tiles.next_power_of_2(size))


def supports(head_size: int) -> bool:
    """Whether the kernels take heads of this size."""
    return 0 < head_size <= MAX_HEAD_SIZE and head_size % 2 == 0


class Packed(NamedTuple):
    """Queries [R, N, D], keys and values [T, N, D] of sequences, and what a launch needs beside."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    seed: Tensor | None
    max_queries: int
    max_keys: int
    p: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that all three kernels take, in their order."""
        return self[:6]

    @property
    def tiles(self) -> Tiles:
        return tiles_of(self.q.device, self.q.dtype, self.q.shape[2])

    def grid(self, longest: int, block: int) -> tuple[tuple[int, ...], int]:
        """(grid, blocks of the longest sequence)"""
        num_blocks = tiles.cdiv(longest, block)
        return (num_blocks * self.q.shape[1] * (self.cu_keys.shape[0] - 1),), num_blocks

    def constants(self, blocks: Blocks, *gradient_stride: int) -> tuple[Any, ...]:
        """The constants of a kernel, from N on; a backward kernel has the gradient's stride too."""
        num_dropped, keep_scale = reference.dropout_threshold(self.p)
        size, dtype = self.q.shape[2], self.q.dtype
        acc = tiles.accumulator(dtype)
        return (
            self.q.shape[1], size, *self.q.stride()[:2], *self.k.stride()[:2], *gradient_stride,
            size**-0.5, num_dropped, keep_scale, blocks.queries, blocks.keys,
            padded_head_size(size), blocks.stages, acc,
            acc if INTERPRETED else TRITON_DTYPES[dtype],
        )  # fmt: skip


TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

_forward = launching.Launcher(packed_attention.forward_kernel)
_dq = launching.Launcher(packed_attention.dq_kernel)
_dkv = launching.Launcher(packed_attention.dkv_kernel)


def _by_token(x: Tensor) -> Tensor:
    """x [T, ..., N, D] itself, or a copy where its strides may depend on the number of tokens.

    Strides are constants of a kernel, so a number of tokens among them would compile anew for each.
    """
    strides = x.stride()
    is_by_token = strides[-1] == 1 and all(s <= strides[0] for s in strides)
    return x if is_by_token or not x.numel() else x.contiguous()


def _attend(packed: Packed) -> tuple[Tensor, Tensor]:
    """(result [R, N, D], lse [N, R])."""
    out, lse = _results(packed.q)
    if out.numel():
        blocks = packed.tiles.forward
        grid, num_blocks = packed.grid(packed.max_queries, blocks.queries)
        _forward(
            grid,
            (*packed.tensors, out, lse),
            (num_blocks, out.shape[0]),
            packed.constants(blocks),
            blocks.num_warps,
        )
    return out, lse


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    num_queries, num_heads, _ = q.shape
    return (
        registered.empty_like(q),
        torch.empty(
            (num_heads, num_queries), dtype=tiles.statistics_dtype(q.dtype), device=q.device
        ),
    )


def _differentiate(
    packed: Packed, dout: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Write the gradients into dq [R, N, D], dk and dv [T, N, D], whose heads are contiguous."""
    dout, delta = dout.contiguous(), torch.empty_like(lse)
    if dq.numel():
        blocks = packed.tiles.dq
        grid, num_blocks = packed.grid(packed.max_queries, blocks.queries)
        _dq(
            grid,
            (dout, *packed.tensors, out, lse, delta, dq),
            (num_blocks, out.shape[0]),
            packed.constants(blocks, dq.stride(0)),
            blocks.num_warps,
        )
    if dk.numel():
        blocks = packed.tiles.dkv
        grid, num_blocks = packed.grid(packed.max_keys, blocks.keys)
        _dkv(
            grid,
            (dout, *packed.tensors, lse, delta, dk, dv),
            (num_blocks, out.shape[0]),
            packed.constants(blocks, dk.stride(0)),
            blocks.num_warps,
        )


# attention: queries, keys and values of all tokens in one tensor.


def _packed(
    qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, p: float
) -> Packed:
    offsets = cu_seqlens.contiguous()
    q, k, v = _by_token(qkv).unbind(1)
    return Packed(q, k, v, offsets, offsets, seed, max_seqlen, max_seqlen, p)


def forward(
    qkv: Tensor, cu_seqlens: Tensor, seed: Tensor | None, max_seqlen: int, p: float
) -> tuple[Tensor, Tensor]:
    """qkv [T, 3, N, D] -> (result [T, N, D], lse [N, T])."""
    return _attend(_packed(qkv, cu_seqlens, seed, max_seqlen, p))


def _outputs(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(qkv[:, 0])


def backward(
    dout: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen: int,
    p: float,
) -> Tensor:
    """The gradient of qkv, [T, 3, N, D] and contiguous."""
    dqkv = registered.empty_like(qkv)
    packed = _packed(qkv, cu_seqlens, seed, max_seqlen, p)
    _differentiate(packed, dout, out, lse, *dqkv.unbind(1))
    return dqkv


def _gradient(dout: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return registered.empty_like(qkv)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.max_seqlen, ctx.p = inputs
    ctx.save_for_backward(*tensors, *output)


def _formula(launch: registered.Launch) -> Any:
    def differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 5
        return launch(dout, *ctx.saved_tensors, ctx.max_seqlen, ctx.p), None, None, None, None

    return differentiate


_call = registered.define(
    "attention", forward, _outputs, _setup_context, backward, _gradient, _formula
)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """See `clue_ds.kernels.attention`."""
    p = dropout_p if training else 0.0
    seeded = registered.fresh_seed(seed, qkv.device) if p > 0.0 else None
    return _call(qkv, cu_seqlens, seeded, max_seqlen, float(p))[0]


# attention_to: queries of their own, fewer than there are tokens.


def _packed_to(
    query: Tensor,
    kv: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_queries: int,
    max_seqlen: int,
    p: float,
) -> Packed:
    k, v = _by_token(kv).unbind(1)
    offsets = (cu_queries.contiguous(), cu_seqlens.contiguous())
    return Packed(_by_token(query), k, v, *offsets, seed, max_queries, max_seqlen, p)


def forward_to(
    query: Tensor,
    kv: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    max_queries: int,
    max_seqlen: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    """query [R, N, D], kv [T, 2, N, D] -> (result [R, N, D], lse [N, R])."""
    return _attend(_packed_to(query, kv, cu_queries, cu_seqlens, seed, max_queries, max_seqlen, p))


def _outputs_to(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _results(query)


def backward_to(
    dout: Tensor,
    query: Tensor,
    kv: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_queries: int,
    max_seqlen: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of query, [R, N, D], and of kv, [T, 2, N, D], both contiguous."""
    dquery, dkv = registered.empty_like(query), registered.empty_like(kv)
    packed = _packed_to(query, kv, cu_queries, cu_seqlens, seed, max_queries, max_seqlen, p)
    _differentiate(packed, dout, out, lse, dquery, *dkv.unbind(1))
    return dquery, dkv


def _gradients_to(dout: Tensor, query: Tensor, kv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return registered.empty_like(query), registered.empty_like(kv)


def _setup_context_to(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.max_queries, ctx.max_seqlen, ctx.p = inputs
    ctx.save_for_backward(*tensors, *output)


def _formula_to(launch: registered.Launch) -> Any:
    def differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 8
        options = (ctx.max_queries, ctx.max_seqlen, ctx.p)
        return *launch(dout, *ctx.saved_tensors, *options), *(None,) * 6

    return differentiate


_call_to = registered.define(
    "attention_to", forward_to, _outputs_to, _setup_context_to, backward_to, _gradients_to,
    _formula_to,
)  # fmt: skip


def attention_to(
    query: Tensor,
    kv: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_queries: int,
    max_seqlen: int,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """See `clue_ds.kernels.attention_to`."""
    p = dropout_p if training else 0.0
    seeded = registered.fresh_seed(seed, query.device) if p > 0.0 else None
    offsets = (cu_queries, cu_seqlens)
    return _call_to(query, kv, *offsets, seeded, max_queries, max_seqlen, float(p))[0]
