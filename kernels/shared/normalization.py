"""LayerNorm's arithmetic, forward and backward, on rows in segments (see tiles.py).

Everything here works on registers and is inlined into the kernels that load and store.
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

    Three passes: the mean; what it lost to rounding, which is the mean of the centred values; the
    squares. Without the second, an fp32 row at a mean of 1e3 has 1.9 times the error of torch's.
    One pass (E[z^2] - E[z]^2) would leave no digit of the variance there, and the second and third
    in one would leave noise where a row is one number throughout.

    `eps` is a number or one a row, where NaN makes a row of NaN.
    """
    SHARE: tl.constexpr = 1.0 / H  # a GPU's fast division is off by two units
    mean = row_sum(z) * SHARE
    centred = ()
    for i in tl.static_range(len(z)):
        inside = tiles.columns(i, BLOCK, TAIL) < H
        centred += (tl.where(inside, z[i] - mean[:, None], 0.0),)
    lost = row_sum(centred) * SHARE
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
    """Write dropout(LayerNorm(z)) and the statistics of rows `first` on; z in segments, 0 outside.

    `eps` as in `normalize`.
    """
    rows = first + tl.arange(0, ROWS)
    mean, rstd, normed = normalize(z, eps, H, BLOCK, TAIL)
    y = ()
    for i in tl.static_range(len(z)):
        cols = tiles.columns(i, BLOCK, TAIL)
        if NUM_DROPPED > 0:
            # Parameters once a row: then a thread holds the eight columns of a counter here too.
            # With four of a [1, BLOCK] fp32 load, drawn words change threads: 3.6 instructions an
            # element at 312. Without dropout it would only take registers.
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
    """(dz, dweight, dbias) of LayerNorm(z) over rows `first` on; the column sums grow by theirs.

    Columns outside hold what nobody stores: only dy and weight need be 0 there. Rows outside are
    zeros, because their mean and rstd are.
    """
    rows = first + tl.arange(0, ROWS)
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
        # Two sums of a row in one reduction: 30 to 40% fewer instructions than one after the other.
        both += tl.sum(tl.join(weighted[i], weighted[i] * normed[i]), axis=1)
    SHARE: tl.constexpr = 1.0 / H
    shift, projection = tl.split(both * SHARE)
    shift = shift[:, None] * rstd[:, None]
    projection = projection[:, None] * rstd[:, None]
    dz = ()
    for i in tl.static_range(len(z)):
        dz += (weighted[i] * rstd[:, None] - (normed[i] * projection + shift),)
    return dz, new_dweight, tiles.add(dbias, dy)
