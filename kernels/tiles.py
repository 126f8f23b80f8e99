"""What row-wise kernels share: tile shapes, the dropout mask, LayerNorm's arithmetic.

A tile is ROWS whole rows of a [M, H] matrix, padded to BLOCK columns, a power of two. H is a
`tl.constexpr`: passed at run time, a hidden size of 312 would make every access 2 bytes wide.
Forward, a row may come in two parts, BLOCK + TAIL columns: 312 as 256 + 64 takes 24 instructions an
element of the fused LayerNorm where 512 takes 46. Backward it stays whole: two parts of three
column sums each leave 128 registers or 64-bit accesses, whichever way they are laid out.

The dropout mask is a function of (seed, row, column): Philox-4x32 with 7 rounds (the fewest that
pass BigCrush) keyed by the seed, counter (column / 8, row); its 128 bits are the 16-bit draws of
eight columns, which costs 14 instructions an element where a draw each costs 61. Tile, warps and
target have no say, so the interpreter, the GPU and `reference.philox_keep` agree bit for bit, and
the backward pass draws the mask again instead of reading one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PHILOX_ROUNDS = tl.constexpr(7)
STAGES = 3  # tiles of a persistent loop that are loaded ahead, plus the one in use
DRAWS = 8  # 16-bit draws of one Philox counter, so the narrowest tile
# Elements of a tile on the interpreter, which pays 20 to 90 ms a program whatever its tile.
INTERPRETED_ELEMENTS = 1 << 17
INTERPRETED_PROGRAMS = 3


class Tile(NamedTuple):
    """Shape of a program: `rows` x `block` elements on `num_warps` warps."""

    rows: int
    block: int
    num_warps: int
    tail: int = 0  # columns of a second part; 0: there is none


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward_tile(width: int) -> Tile:
    """One warp a row up to 1024 (no shared memory in reductions); 16 to 32 elements a thread."""
    block = max(DRAWS, next_power_of_2(width))
    return Tile(max(1, min(32, 1024 // block)), block, max(1, block // 1024))


def row_tile(width: int) -> Tile:
    """Of a LayerNorm forward: `forward_tile`, with padding that a second part saves left out.

    Only from 256 columns on, what a warp reads at once, and for a tail below that: whole accesses
    outside of the row, like the last 256 columns of 768 in 1024, the compiler drops by itself.
    """
    whole = forward_tile(width)
    lead = whole.block // 2
    tail = max(DRAWS, next_power_of_2(width - lead))
    if lead < 256 or tail >= 256 or tail == lead:
        return whole
    rows = max(1, 1280 // (lead + tail))  # at most 40 elements a thread
    return Tile(1 << (rows.bit_length() - 1), lead, max(1, lead // 1024), tail)


def backward_tile(width: int, num_sums: int = 2) -> Tile:
    """16 elements a thread, or 8 (one access of bf16) where `num_sums` is three column sums.

    Each column sum takes a register an element; with three, 16 elements come to 165 registers.
    """
    block = max(DRAWS, next_power_of_2(width))
    per_warp = 512 if num_sums < 3 else 256
    return Tile(max(1, min(32, per_warp // block)), block, max(1, block // per_warp))


def for_device(tile: Tile, x: Tensor, num_rows: int) -> Tile:
    """`tile` on a GPU; on a CPU few tall programs, because there each program costs the same."""
    if x.is_cuda:
        return tile
    tallest = max(1, INTERPRETED_ELEMENTS // tile.block)
    return tile._replace(rows=min(tallest, next_power_of_2(-(-num_rows // 2))))


def num_persistent(x: Tensor, num_tiles: int, tile: Tile) -> int:
    """Programs of a persistent kernel, each of which takes every n-th tile.

    4096 elements a multiprocessor: with STAGES tiles of two bf16 inputs on their way that is 48 KiB
    in flight on each; 3 TB/s at 1 us of latency need 23. More would write more partial sums.
    """
    if not x.is_cuda:
        return min(num_tiles, INTERPRETED_PROGRAMS)
    num_multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return min(num_tiles, max(1, 4096 // (tile.rows * tile.block)) * num_multiprocessors)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes and keeps sums in: fp32, except for fp64 inputs (gradcheck)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """`statistics_dtype` in Triton's terms."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def keep_tile(
    seed_ptr: tl.tensor,
    first_row: tl.tensor,
    NUM_DROPPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST_COLUMN: tl.constexpr = 0,
) -> tl.tensor:
    """bool [ROWS, BLOCK], False where an element is dropped; FIRST_COLUMN is a multiple of 8."""
    if NUM_DROPPED == 65536:
        return tl.zeros((ROWS, BLOCK), tl.int1)
    GROUPS: tl.constexpr = BLOCK // 8
    seed = tl.load(seed_ptr)
    rows = first_row.to(tl.int64) + tl.arange(0, ROWS)
    groups = (tl.arange(0, GROUPS) + FIRST_COLUMN // 8).to(tl.uint32)
    zero = tl.zeros((ROWS, GROUPS), tl.uint32)
    column = zero + groups[None, :]
    row_low = zero + (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    row_high = zero + (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, column, row_low, row_high, zero, PHILOX_ROUNDS)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # Both halves compared in the upper 16 bits: no shift for the second.
    THRESHOLD: tl.constexpr = NUM_DROPPED * 65536
    return tl.interleave((words << 16) >= THRESHOLD, words >= THRESHOLD)


@triton.jit
def columns(part: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr) -> tl.tensor:
    """int32 [1, BLOCK] of part 0, [1, TAIL] of part 1."""
    if part == 0:
        return tl.arange(0, BLOCK)[None, :]
    else:
        return BLOCK + tl.arange(0, TAIL)[None, :]


@triton.jit
def row_sum(parts: tl.tuple) -> tl.tensor:
    """[ROWS]: sum of each row over all its parts."""
    total = tl.sum(parts[0], axis=1)
    for part in tl.static_range(1, len(parts)):
        total += tl.sum(parts[part], axis=1)
    return total


@triton.jit
def normalize(
    z: tl.tuple, EPS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
) -> tl.tuple:
    """(mean, rstd, (z - mean) * rstd in z's parts), z being 0 outside. Passes over registers only.

    Three passes: the mean; what it lost to rounding, which is the mean of the centred values; the
    squares. Without the second, an fp32 row at a mean of 1e3 has 1.9 times the error of torch's.
    One pass (E[z^2] - E[z]^2) would leave no digit of the variance there.
    """
    mean = row_sum(z) / H
    centred = ()
    for part in tl.static_range(len(z)):
        inside = columns(part, BLOCK, TAIL) < H
        centred += (tl.where(inside, z[part] - mean[:, None], 0.0),)
    lost = row_sum(centred) / H
    exact = ()
    squares = ()
    for part in tl.static_range(len(z)):
        inside = columns(part, BLOCK, TAIL) < H
        difference = tl.where(inside, centred[part] - lost[:, None], 0.0)
        exact += (difference,)
        squares += (difference * difference,)
    rstd = 1.0 / tl.sqrt(row_sum(squares) / H + EPS)
    normed = ()
    for part in tl.static_range(len(z)):
        normed += (exact[part] * rstd[:, None],)
    return mean + lost, rstd, normed


@triton.jit
def store_layer_norm(
    z: tl.tuple,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    first: tl.tensor,
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
    """Write dropout(LayerNorm(z)) and the statistics of rows `first` on; z in parts, 0 outside."""
    rows = first + tl.arange(0, ROWS)
    mean, rstd, normed = normalize(z, EPS, H, BLOCK, TAIL)
    for part in tl.static_range(len(z)):
        cols = columns(part, BLOCK, TAIL)
        y = normed[part]
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + cols, mask=cols < H, other=0.0).to(ACC)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(ACC)
        if NUM_DROPPED > 0:
            keep = keep_tile(
                seed_ptr, first, NUM_DROPPED, ROWS, TAIL if part else BLOCK, part * BLOCK
            )
            y = tl.where(keep, y * KEEP_SCALE, 0.0)
        local = tl.arange(0, ROWS)[:, None] * H + cols
        tl.store(y_ptr + first * H + local, y, mask=(rows < num_rows)[:, None] & (cols < H))
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit
def normalize_gradient(
    dy: tl.tensor, normed: tl.tensor, weight: tl.tensor, rstd: tl.tensor, H: tl.constexpr
) -> tl.tensor:
    """Gradient of normalize's input rows, where dy is that of `normed * weight + bias`."""
    weighted = dy * weight
    mean_weighted = tl.sum(weighted, axis=1) / H
    mean_projected = tl.sum(weighted * normed, axis=1) / H
    return (weighted - mean_weighted[:, None] - normed * mean_projected[:, None]) * rstd[:, None]
