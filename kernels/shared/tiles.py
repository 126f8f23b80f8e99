"""What row-wise kernels share: tile shapes, rows and columns in segments, the dropout mask.

A tile is ROWS whole rows of a [M, H] matrix. Triton needs a power of two of columns, so a row is
padded to BLOCK columns, or split into two segments of BLOCK and TAIL columns, each a power of two:
in the forward pass of the fused LayerNorm, 312 as 256 + 64 takes 25 instructions per element and
as 512 it takes 46. A value that holds rows or columns is therefore a tuple of one tensor per
segment. H is a `tl.constexpr`: were it passed at run time, a hidden size of 312 would make every
access 2 bytes wide.

The dropout mask is a function of (seed, row, column) alone, so the interpreter, the GPU and
`reference.philox_keep` agree bit for bit whatever the tile, the warps and the target, and the
backward pass draws the mask again instead of reading it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PHILOX_ROUNDS = tl.constexpr(7)
STAGES = 3  # tiles of a persistent loop: two loaded ahead, one in use
LANES = 64 if torch.version.hip else 32  # of a warp
DRAWS = 8  # 16-bit draws of one Philox counter, so the narrowest tile
# On the interpreter, which pays 20 to 90 ms a program whatever its tile: elements of a tile, tiles
# of a matrix that would fit into one, persistent programs. With one tile NumPy would add a column
# row after row, up to twice the error of torch's sums, where a GPU's tiles hold a few rows each.
INTERPRETED_ELEMENTS = 1 << 17
INTERPRETED_TILES = 8
INTERPRETED_PROGRAMS = 3


class Tile(NamedTuple):
    """Shape of a program: `rows` x `block` elements on `num_warps` warps."""

    rows: int
    block: int
    num_warps: int
    tail: int = 0  # columns of the second segment; 0 where a row is one segment

    @property
    def constants(self) -> tuple[int, int, int]:
        """ROWS, BLOCK, TAIL."""
        return self.rows, self.block, self.tail


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(length: int, size: int) -> int:
    """The number of blocks of `size` that cover `length`; `triton.cdiv` takes 3 us on the host."""
    return -(-length // size)


@cache
def forward_tile(width: int) -> Tile:
    """One warp a row up to 1024 (no shared memory in reductions); 16 to 32 elements a thread."""
    block = max(DRAWS, next_power_of_2(width))
    return Tile(max(1, min(32, 1024 // block)), block, max(1, block // 1024))


@cache
def row_tile(width: int) -> Tile:
    """Of a LayerNorm forward: `forward_tile`, with padding that a second segment saves left out.

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


@cache
def backward_tile(width: int, num_sums: int = 2, lanes: int = LANES) -> Tile:
    """8 to 16 elements a thread: each column sum takes a register an element.

    A second segment is half of the first: fewer columns, or more lanes, would be 32-bit accesses. A
    whole row has 16 elements a thread beside two column sums, 8 (one access of bf16) beside three
    and on 64 lanes, where 16 take more than 128 registers.
    """
    block = max(DRAWS, next_power_of_2(width))
    lead = block // 2
    if lanes == 32 and lead >= 256 and width <= lead + lead // 2:
        return Tile(1, lead, lead // 256, lead // 2)
    per_warp = 512 if num_sums < 3 or lanes == 64 else 256
    return Tile(max(1, min(32, per_warp // block)), block, max(1, block // per_warp))


def for_device(tile: Tile, x: Tensor, num_rows: int) -> Tile:
    """`tile` on a GPU; on a CPU few tall programs, because there each program costs the same."""
    if x.is_cuda:
        return tile
    tallest = max(1, INTERPRETED_ELEMENTS // tile.block)
    return tile._replace(rows=min(tallest, next_power_of_2(cdiv(num_rows, INTERPRETED_TILES))))


def num_persistent(x: Tensor, num_tiles: int, tile: Tile) -> int:
    """Programs of a persistent kernel, each of which takes every n-th tile.

    4096 elements a multiprocessor: with two tiles of two bf16 inputs on their way that is 32 KiB in
    flight on each; 3 TB/s at 1 us of latency need 23. More would write more partial sums.
    """
    if not x.is_cuda:
        return min(num_tiles, INTERPRETED_PROGRAMS)
    return min(num_tiles, max(1, 4096 // (tile.rows * tile.block)) * _num_multiprocessors(x.device))


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes and keeps sums in: fp32, except for fp64 inputs (gradcheck)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """`statistics_dtype` in Triton's terms."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def keep_tile(
    seed: tl.tensor,
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
def columns(segment: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr) -> tl.tensor:
    """int32 [1, BLOCK] of segment 0, [1, TAIL] of segment 1."""
    if segment == 0:
        return tl.arange(0, BLOCK)[None, :]
    else:
        return BLOCK + tl.arange(0, TAIL)[None, :]


@triton.jit
def load_parameter(
    ptr: tl.tensor, column: tl.tensor, H: tl.constexpr, ACC: tl.constexpr
) -> tl.tensor:
    """Columns [N] of a parameter [H] as [1, N] in ACC, 0 outside, for a loop over rows.

    Spread over threads as it suits the loop: layouts don't pass a gather. The loop would otherwise
    take on the layout that an fp32 parameter was loaded in, and move each tile of bf16 rows through
    shared memory (Triton 3.9) or compute it in both layouts (3.6).
    """
    values = tl.load(ptr + column, mask=column < H, other=0.0).to(ACC)
    return tl.gather(values, tl.arange(0, values.shape[0]), axis=0)[None, :]


@triton.jit
def load_columns(
    ptr: tl.tensor, H: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr
) -> tl.tuple:
    """A parameter [H] as segments [1, columns] in ACC, 0 outside; 1 where there is none."""
    segments = ()
    for i in tl.static_range(2 if TAIL else 1):
        cols = columns(i, BLOCK, TAIL)
        if ptr is not None:
            column = i * BLOCK + tl.arange(0, cols.shape[1])
            segments += (load_parameter(ptr, column, H, ACC),)
        else:
            segments += (tl.full(cols.shape, 1.0, ACC),)
    return segments


@triton.jit
def load_rows(
    ptr: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tuple:
    """Rows `first` on as segments [ROWS, columns] in ACC, 0 outside. `first` is 64-bit."""
    segments = ()
    inside = (first + tl.arange(0, ROWS) < num_rows)[:, None]
    for i in tl.static_range(2 if TAIL else 1):
        cols = columns(i, BLOCK, TAIL)
        # 64-bit once a program, 32-bit inside: M * H passes 2^31 on real batches.
        at = first * H + (tl.arange(0, ROWS)[:, None] * H + cols)
        segments += (tl.load(ptr + at, mask=inside & (cols < H), other=0.0).to(ACC),)
    return segments


@triton.jit
def store_rows(
    ptr: tl.tensor,
    segments: tl.tuple,
    first: tl.tensor,
    num_rows: tl.tensor,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Where `load_rows` reads."""
    inside = (first + tl.arange(0, ROWS) < num_rows)[:, None]
    for i in tl.static_range(len(segments)):
        cols = columns(i, BLOCK, TAIL)
        at = first * H + (tl.arange(0, ROWS)[:, None] * H + cols)
        tl.store(ptr + at, segments[i], mask=inside & (cols < H))


@triton.jit
def no_sums(
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr
) -> tl.tuple:
    """Column sums over no rows yet, in segments [ROWS, columns]: each row of a tile has its own."""
    if TAIL:
        return tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, TAIL), ACC)
    else:
        return (tl.zeros((ROWS, BLOCK), ACC),)


@triton.jit
def add(sums: tl.tuple, terms: tl.tuple) -> tl.tuple:
    """Add each segment of `terms` to the same segment of `sums`."""
    segments = ()
    for i in tl.static_range(len(sums)):
        segments += (sums[i] + terms[i],)
    return segments


@triton.jit
def store_sums(
    partials_ptr: tl.tensor,
    index: tl.constexpr,
    sums: tl.tuple,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Write this program's column sums [H] into its row of partials [sums, programs, H]."""
    at = partials_ptr + (index * tl.num_programs(0) + tl.program_id(0)) * H
    for i in tl.static_range(len(sums)):
        cols = columns(i, BLOCK, TAIL)
        total = tl.sum(sums[i], axis=0, keep_dims=True)
        tl.store(at + cols, total, mask=cols < H)


@triton.jit
def dropout(
    segments: tl.tuple,
    seed: tl.tensor,
    first: tl.tensor,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
) -> tl.tuple:
    """Rows `first` on, segment by segment, without what `keep_tile` drops."""
    kept = ()
    for i in tl.static_range(len(segments)):
        keep = keep_tile(seed, first, NUM_DROPPED, ROWS, TAIL if i else BLOCK, i * BLOCK)
        kept += (tl.where(keep, segments[i] * KEEP_SCALE, 0.0),)
    return kept
