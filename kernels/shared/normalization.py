"""LayerNorm's arithmetic, forward and backward, on rows in segments (see tiles.py).

Triton inlines these functions into the kernels that call them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles


@triton.jit
def row_sum(segments: tl.tuple) -> tl.tensor:
    """[ROWS]: sum of each row over all its segments."""
    total = tl.sum(segments[0], axis=1)
    for i in tl.static_range(1, len(segments)):
        total += tl.sum(segments[i], axis=1)
    return total


@triton.jit
def normalize(
    z: tl.tuple, eps: tl.tensor, H: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr
) -> tl.tuple:
    """(mean, rstd, (z - mean) * rstd in z's segments); z is 0 outside. Reads registers only.

    `eps` is a number, or one per row; a NaN there makes the whole row NaN.
    """
    # Three passes. Rejected: one pass (E[z^2] - E[z]^2), which leaves no digit of the variance of
    # an fp32 row at a mean of 1e3.
    #
    # First pass: the mean, by a product with 1 / H, as a GPU's fast division is off by two units.
    SHARE: tl.constexpr = 1.0 / H
    mean = row_sum(z) * SHARE
    centred = ()
    for i in tl.static_range(len(z)):
        inside = tiles.columns(i, BLOCK, TAIL) < H
        centred += (tl.where(inside, z[i] - mean[:, None], 0.0),)
    # Second pass: what the mean lost to rounding, which is the mean of the centred values. Without
    # this correction an fp32 row at a mean of 1e3 has 1.9 times the error of torch's LayerNorm.
    lost = row_sum(centred) * SHARE
    # Third pass: the squares of the corrected differences. Correcting the variance afterwards
    # instead, as (mean of centred^2) - lost^2, would save a pass and leave noise in place of 0 for
    # a row whose elements are all the same number.
    exact = ()
    squares = ()
    for i in tl.static_range(len(z)):
        inside = tiles.columns(i, BLOCK, TAIL) < H
        difference = tl.where(inside, centred[i] - lost[:, None], 0.0)
        exact += (difference,)
        squares += (difference * difference,)
    rstd = tl.rsqrt(row_sum(squares) * SHARE + eps)
    normed = ()
    for i in tl.static_range(len(z)):
        normed += (exact[i] * rstd[:, None],)
    return mean + lost, rstd, normed


@triton.jit
def store(
    z: tl.tuple,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    statistics_ptr: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    eps: tl.tensor,
    NUM_DROPPED: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Write dropout(LayerNorm(z)) and the statistics of ROWS rows from `first`.

    z is in segments, 0 outside; `eps` is as in `normalize`.
    """
    rows = first + tl.arange(0, ROWS)
    mean, rstd, normed = normalize(z, eps, H, BLOCK, TAIL)
    y = ()
    for i in tl.static_range(len(z)):
        cols = tiles.columns(i, BLOCK, TAIL)
        if NUM_DROPPED > 0:
            # This makes the addresses [ROWS, columns], so that parameters are loaded for each row
            # and a thread holds eight columns of them, the eight that one Philox counter serves. An
            # fp32 load of [1, columns] gives a thread four, and moving the drawn words between
            # threads costs 3.6 instructions per element at 312. Without dropout, loading parameters
            # for each row would only cost registers.
            cols += tl.zeros((ROWS, 1), tl.int32)
        value = normed[i]
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + cols, mask=cols < H, other=0.0).to(ACC)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + cols, mask=cols < H, other=0.0).to(ACC)
        y += (value,)
    if NUM_DROPPED > 0:
        seed = tl.load(seed_ptr)
        y = tiles.dropout(y, seed, first, NUM_DROPPED, KEEP_SCALE, ROWS, BLOCK, TAIL)
    tiles.store_rows(y_ptr, y, first, num_rows, H, ROWS, BLOCK, TAIL)
    tl.store(statistics_ptr + rows, mean, mask=rows < num_rows)
    tl.store(statistics_ptr + num_rows + rows, rstd, mask=rows < num_rows)


@triton.jit
def gradient(
    dy: tl.tuple,
    z: tl.tuple,
    weight: tl.tuple,
    statistics_ptr: tl.tensor,
    first: tl.tensor,
    num_rows: tl.tensor,
    dweight: tl.tuple,
    dbias: tl.tuple,
    H: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tuple:
    """(dz, dweight, dbias) of LayerNorm(z) over ROWS rows from `first`.

    Returns the column sums `dweight` and `dbias` with those of these rows added. dy and weight must
    be 0 in columns outside, where dz is then undefined and never stored.
    """
    rows = first + tl.arange(0, ROWS)
    # Rows outside add nothing to the sums, because dy is 0 there; mean and rstd are 0 as well.
    mean = tl.load(statistics_ptr + rows, mask=rows < num_rows, other=0.0)[:, None]
    rstd = tl.load(statistics_ptr + num_rows + rows, mask=rows < num_rows, other=0.0)
    normed = ()
    weighted = ()
    new_dweight = ()
    both = tl.zeros((ROWS, 2), mean.dtype)
    for i in tl.static_range(len(z)):
        normed += ((z[i] - mean) * rstd[:, None],)
        weighted += (dy[i] * weight[i],)
        new_dweight += (dweight[i] + dy[i] * normed[i],)
        # Both sums that a row needs in one reduction of pairs: 30 to 40% fewer instructions than
        # two reductions.
        both += tl.sum(tl.join(weighted[i], weighted[i] * normed[i]), axis=1)
    SHARE: tl.constexpr = 1.0 / H
    shift, projection = tl.split(both * SHARE)
    shift = shift[:, None] * rstd[:, None]
    projection = projection[:, None] * rstd[:, None]
    dz = ()
    for i in tl.static_range(len(z)):
        dz += (weighted[i] * rstd[:, None] - (normed[i] * projection + shift),)
    return dz, new_dweight, tiles.add(dbias, dy)
