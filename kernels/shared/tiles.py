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

from .. import reference

STAGES = 3  # tiles of a persistent loop: two are being loaded while one is in use
LANES = 64 if torch.version.hip else 32  # of a warp
DRAWS = reference.DRAWS  # of one Philox counter, which makes it the narrowest tile
# `tl.constexpr`, because Triton lets a kernel read no other global.
PHILOX_ROUNDS = tl.constexpr(reference.PHILOX_ROUNDS)
DRAWS_PER_COUNTER = tl.constexpr(reference.DRAWS)
WORDS = tl.constexpr(reference.DRAWS // 2)  # of one counter
QUAD = tl.constexpr(reference.QUAD)
DROPOUT_LEVELS = tl.constexpr(reference.DROPOUT_LEVELS)

# The interpreter takes 20 to 90 ms per program whatever the tile, so there tiles are large and
# programs few. A matrix is still cut into several tiles even if one could hold it: NumPy would add
# up the rows of a single tile one after another, with up to twice the error of torch's sums, where
# a tile on a GPU holds a few rows only.
INTERPRETED_ELEMENTS = 1 << 17  # of a tile, at most
INTERPRETED_TILES = 8  # of a matrix that would fit into one
INTERPRETED_PROGRAMS = 3  # of a persistent kernel


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
    """One warp per row up to 1024 columns, so that reductions need no shared memory.

    A thread holds 16 to 32 elements.
    """
    block = max(DRAWS, next_power_of_2(width))
    return Tile(max(1, min(32, 1024 // block)), block, max(1, block // 1024))


@cache
def row_tile(width: int) -> Tile:
    """The tile of LayerNorm's forward pass: `forward_tile`, in two segments where they pad less.

    A warp reads 256 columns at once. The compiler drops by itself an access that lies outside the
    row as a whole, such as the last 256 columns of 768 in 1024, so a second segment only helps if
    the first has 256 columns or more and the second fewer.
    """
    whole = forward_tile(width)
    lead = whole.block // 2
    tail = max(DRAWS, next_power_of_2(width - lead))
    if lead < 256 or tail >= 256 or tail == lead:
        return whole
    rows = max(1, 1280 // (lead + tail))  # at most 40 elements per thread
    return Tile(1 << (rows.bit_length() - 1), lead, max(1, lead // 1024), tail)


@cache
def backward_tile(width: int, num_sums: int = 2, lanes: int = LANES) -> Tile:
    """The tile of a backward pass, 8 to 16 elements per thread.

    That is fewer than in the forward pass, because each column sum takes a register per element. A
    second segment has half of the columns of the first; with fewer columns, or with 64 lanes, it
    would be read by 32-bit accesses. A row in one segment has 16 elements per thread beside two
    column sums, and 8 (one access of bf16) beside three sums or on 64 lanes, where 16 elements
    take more than 128 registers.
    """
    block = max(DRAWS, next_power_of_2(width))
    lead = block // 2
    if lanes == 32 and lead >= 256 and width <= lead + lead // 2:
        return Tile(1, lead, lead // 256, lead // 2)
    per_warp = 512 if num_sums < 3 or lanes == 64 else 256
    return Tile(max(1, min(32, per_warp // block)), block, max(1, block // per_warp))


def for_device(tile: Tile, x: Tensor, num_rows: int) -> Tile:
    """`tile` itself on a GPU; on a CPU one of many rows, because each program costs the same."""
    if x.is_cuda:
        return tile
    tallest = max(1, INTERPRETED_ELEMENTS // tile.block)
    return tile._replace(rows=min(tallest, next_power_of_2(cdiv(num_rows, INTERPRETED_TILES))))


def num_persistent(x: Tensor, num_tiles: int, tile: Tile) -> int:
    """The number n of programs of a persistent kernel, each of which takes every n-th tile.

    It gives each multiprocessor 4096 elements. With two tiles of two bf16 inputs being loaded, that
    keeps 32 KiB in flight per multiprocessor; 3 TB/s at a latency of 1 us needs 23 KB. More
    programs would write more partial sums.
    """
    if not x.is_cuda:
        return min(num_tiles, INTERPRETED_PROGRAMS)
    return min(num_tiles, max(1, 4096 // (tile.rows * tile.block)) * _num_multiprocessors(x.device))


@cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel computes and sums in: fp32, except for fp64 inputs (gradcheck)."""
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
    if NUM_DROPPED == DROPOUT_LEVELS:
        return tl.zeros((ROWS, BLOCK), tl.int1)
    rows = first_row.to(tl.int64) + tl.arange(0, ROWS)
    COUNTERS: tl.constexpr = BLOCK // DRAWS_PER_COUNTER
    first = FIRST_COLUMN // DRAWS_PER_COUNTER
    w0, w1, w2, w3 = draw(seed, rows, first, ROWS, COUNTERS)
    # `interleave` alternates its arguments, so that this nesting gives w0, w1, w2, w3 in the order
    # of columns, and the last line the low half of each word before its high half.
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # Both halves are compared as the upper 16 bits of a word, which saves a shift for the high one.
    THRESHOLD: tl.constexpr = NUM_DROPPED * DROPOUT_LEVELS
    return tl.interleave((words << 16) >= THRESHOLD, words >= THRESHOLD)


@triton.jit
def keep_scores(
    seed: tl.tensor,
    rows: tl.tensor,
    first_column: tl.tensor,
    NUM_DROPPED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """bool [ROWS, BLOCK] for `rows`, int64 [ROWS], in the order of `reference.philox_keep_scores`.

    BLOCK and `first_column` are multiples of 32. The order is that of a product's result in the
    registers of tensor cores, so the compiler has each thread draw for the scores that it holds:
    with the order of `keep_tile` they went through shared memory, for 4 to 6 instructions a score
    and 50 registers a thread.
    """
    if NUM_DROPPED == DROPOUT_LEVELS:
        return tl.zeros((ROWS, BLOCK), tl.int1)
    COUNTERS: tl.constexpr = BLOCK // DRAWS_PER_COUNTER
    w0, w1, w2, w3 = draw(seed, rows, first_column // DRAWS_PER_COUNTER, ROWS, COUNTERS)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [..., i, j] is word i + 2 * j ...
    words = tl.permute(words, (0, 1, 3, 2))  # ... and [..., j, i] afterwards
    THRESHOLD: tl.constexpr = NUM_DROPPED * DROPOUT_LEVELS
    keep = tl.join((words << 16) >= THRESHOLD, words >= THRESHOLD)
    keep = tl.reshape(keep, (ROWS, COUNTERS // QUAD, QUAD, WORDS, 2))
    return tl.reshape(tl.permute(keep, (0, 1, 3, 2, 4)), (ROWS, BLOCK))


@triton.jit
def draw(
    seed: tl.tensor,
    rows: tl.tensor,
    first_counter: tl.tensor,
    ROWS: tl.constexpr,
    COUNTERS: tl.constexpr,
) -> tl.tuple:
    """Four words of 32 random bits of each counter of each row, uint32 [ROWS, COUNTERS] each.

    The counter is (its number in the row, low and high half of the row, 0). A word has two draws of
    16 bits; that costs 7 instructions per draw, and a `tl.rand` for each element 61. Seven rounds
    are the fewest that pass BigCrush.
    """
    numbers = (tl.arange(0, COUNTERS) + first_counter).to(tl.uint32)
    zero = tl.zeros((ROWS, COUNTERS), tl.uint32)
    row_low = zero + (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    row_high = zero + (rows >> 32).to(tl.uint32)[:, None]
    return tl.philox(seed, zero + numbers[None, :], row_low, row_high, zero, PHILOX_ROUNDS)


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
    """Columns [N] of a parameter [H] as [1, N] in ACC, 0 outside, for a loop over rows."""
    values = tl.load(ptr + column, mask=column < H, other=0.0).to(ACC)
    # A gather of every element in its own place, because Triton doesn't carry layouts through it,
    # so the values can be spread over threads as the loop needs them. Without it the loop takes on
    # the layout in which an fp32 parameter is loaded, and moves each tile of bf16 rows through
    # shared memory (Triton 3.9) or computes it in both layouts (3.6).
    return tl.gather(values, tl.arange(0, values.shape[0]), axis=0)[None, :]


@triton.jit
def load_columns(
    ptr: tl.tensor, H: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr
) -> tl.tuple:
    """A parameter [H] as segments [1, columns] in ACC, 0 outside; ones if `ptr` is None."""
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
    """ROWS rows from `first`, which is 64-bit, as segments [ROWS, columns] in ACC, 0 outside."""
    segments = ()
    inside = (first + tl.arange(0, ROWS) < num_rows)[:, None]
    for i in tl.static_range(2 if TAIL else 1):
        cols = columns(i, BLOCK, TAIL)
        # M * H passes 2^31 on real batches, so the tile's start is 64-bit: computed once, for the
        # whole tile. Offsets inside the tile are 32-bit.
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
    """Write segments to the places that `load_rows` reads."""
    inside = (first + tl.arange(0, ROWS) < num_rows)[:, None]
    for i in tl.static_range(len(segments)):
        cols = columns(i, BLOCK, TAIL)
        at = first * H + (tl.arange(0, ROWS)[:, None] * H + cols)
        tl.store(ptr + at, segments[i], mask=inside & (cols < H))


@triton.jit
def no_sums(
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, ACC: tl.constexpr
) -> tl.tuple:
    """Zeros to start column sums from, in segments [ROWS, columns].

    Each of a tile's ROWS rows has sums of its own, which `store_sums` adds up after the loop: in
    the loop an addition then needs no other thread.
    """
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
    """ROWS rows from `first`, in segments, scaled by KEEP_SCALE, 0 where `keep_tile` drops."""
    kept = ()
    for i in tl.static_range(len(segments)):
        keep = keep_tile(seed, first, NUM_DROPPED, ROWS, TAIL if i else BLOCK, i * BLOCK)
        kept += (tl.where(keep, segments[i] * KEEP_SCALE, 0.0),)
    return kept
