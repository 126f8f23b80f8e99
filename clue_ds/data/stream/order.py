"""The order of the stream: which sample stands at each position, and in which epoch.

Sample numbers run through the shards in file order; what a sample is (samples), and which rows a
rank takes (sampler.py), is not known here. Both orders are pure functions of the position, found in
constant time and memory, with each sample exactly once an epoch:

- shuffle: position p is sample permute(p mod N) of epoch p div N, a keyed permutation of range(N)
  that is new in each epoch. Reads are random: for a corpus that fits into memory.
- lanes: reads are sequential, for a corpus that doesn't. The N samples of an epoch are laid out
  from a keyed start in blocks of about 1 MiB, the blocks permuted by key, and this line cut into
  NUM_LANES equal lanes. A lane goes along its piece in windows of 8 blocks and permutes inside the
  window. A batch takes as many rows from each lane; ranks divide the rows, and so the lanes, among
  them. The block that is short (N is no multiple of the block) stays at the line's end; the keyed
  start makes it other samples in each epoch. Lanes enter their windows one after the other, which
  spreads the reading evenly. Any N works: a tiny corpus just fills no block.

A mixture takes each position's part from cycles of 1000 positions a lane: every cycle holds exactly
share * 1000 positions of each part, in an order that is new in each cycle. Each part then has a
stream, and epochs, of its own.

Rejected: a shuffled index list (8 bytes a sample a process, and minutes to make at a billion
samples), a balanced Feistel network (its domain is a power of four, so up to three of four indices
are walked over; two radices near the root of N walk over almost none), a shuffle buffer of samples
(its content is a state that a resume must rebuild), lanes that depend on the number of ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled, inlined

NUM_ROUNDS = 6
MAX_LANES = 64
BLOCK_BYTES = 1 << 20
BLOCKS_PER_WINDOW = 8
CYCLE = 1000  # positions of a lane in which every part's share is exact

_HALF = np.uint64(32)
# What the keys of one epoch of a part are used for; windows count lanes and windows from there.
_START, _BLOCKS, _WINDOWS = np.uint64(0), np.uint64(1), np.uint64(2)
_CYCLES = np.uint64(1 << 62)  # no epoch: its key orders the parts of a mixture


class OrderTable(NamedTuple):
    """The order's numbers, in the form in which the compiled code reads them."""

    global_batch_size: int
    num_lanes: int  # divides global_batch_size
    uses_lanes: bool
    block: int  # samples a block
    num_samples: np.ndarray  # int64 [parts]
    first_samples: np.ndarray  # int64 [parts]: number of each part's sample 0
    cycle_ends: np.ndarray  # int64 [parts]: a cycle's positions of the parts up to this one
    keys: np.ndarray  # uint64 [parts + 1]; the last one orders the cycles


def order_table(
    num_samples: np.ndarray,
    shares: np.ndarray,
    global_batch_size: int,
    uses_lanes: bool,
    block: int,
    order_key: np.uint64,
) -> OrderTable:
    """The order over parts with num_samples int64 [parts] and shares int64 [parts] of CYCLE."""
    assert shares.sum() == CYCLE and (shares > 0).all() and (num_samples > 0).all() and block > 0
    return OrderTable(
        global_batch_size=global_batch_size,
        num_lanes=math.gcd(MAX_LANES, global_batch_size),
        uses_lanes=uses_lanes,
        block=block,
        num_samples=num_samples.astype(np.int64),
        first_samples=np.concatenate([[0], np.cumsum(num_samples)[:-1]]).astype(np.int64),
        cycle_ends=np.cumsum(shares).astype(np.int64),
        keys=part_keys(len(shares), np.uint64(order_key)),
    )


@compiled
def part_keys(num_parts: int, order_key: np.uint64) -> np.ndarray:
    """Keys of the parts and of the cycles; a corpus by itself has the order's key."""
    keys = np.empty(num_parts + 1, dtype=np.uint64)
    keys[0] = order_key
    keys[num_parts] = derive(np.uint64(order_key), _CYCLES)
    if num_parts > 1:
        for part in range(num_parts):
            keys[part] = derive(keys[num_parts], _CYCLES + np.uint64(part))
    return keys


@inlined
def _offset(key: np.uint64, value: np.uint64, radix: np.uint64) -> np.uint64:
    """A keyed pseudorandom function of `value`, below `radix` (which is below 2^32)."""
    return ((derive(key, value) >> _HALF) * radix) >> _HALF


@inlined
def _permute(index: np.uint64, num: np.uint64, key: np.uint64) -> np.uint64:
    """The place of `index` in a keyed permutation of range(num): a Feistel network, two radices."""
    left_radix = np.uint64(math.ceil(math.sqrt(np.float64(num))))
    right_radix = (num + left_radix - np.uint64(1)) // left_radix
    while True:
        left, right = index // right_radix, index % right_radix
        for round_number in range(NUM_ROUNDS):
            round_key = derive(key, np.uint64(round_number))
            if round_number % 2 == 0:
                left += _offset(round_key, right, left_radix)
                left -= left_radix if left >= left_radix else np.uint64(0)
            else:
                right += _offset(round_key, left, right_radix)
                right -= right_radix if right >= right_radix else np.uint64(0)
        index = left * right_radix + right
        if index < num:
            return index


@compiled
def permutation(num: int, key: np.uint64) -> np.ndarray:
    """All of the keyed permutation of range(num), int64 [num]: for tests, small `num`."""
    result = np.empty(num, dtype=np.int64)
    for index in range(num):
        result[index] = _permute(np.uint64(index), np.uint64(num), np.uint64(key))
    return result


@inlined
def _place(index: int, num: int, key: np.uint64) -> int:
    """_permute for signed numbers."""
    return np.int64(_permute(np.uint64(index), np.uint64(num), key))


@inlined
def _before(position: int, lane: int, num_lanes: int) -> int:
    """How many of range(position) belong to the lanes below `lane`, lane = position mod lanes."""
    return position // num_lanes * lane + min(position % num_lanes, lane)


@inlined
def _window(position: int, num: int, table: OrderTable) -> tuple[int, int, int, int, int]:
    """Of a position in a part: epoch, window of the lane, index in it; the window on the line."""
    epoch = position // num
    lane = position % table.num_lanes
    first, end = epoch * num, (epoch + 1) * num
    begin = _before(end, lane, table.num_lanes) - _before(first, lane, table.num_lanes)
    limit = _before(end, lane + 1, table.num_lanes) - _before(first, lane + 1, table.num_lanes)
    # Of the lane's positions before this one, those in this epoch.
    index = position // table.num_lanes - (first - lane + table.num_lanes - 1) // table.num_lanes
    size = BLOCKS_PER_WINDOW * table.block
    phase = lane * size // table.num_lanes
    window = (index + phase) // size
    low = max(begin, begin + window * size - phase)
    high = min(limit, begin + (window + 1) * size - phase)
    return epoch, window, begin + index - low, low, high


@inlined
def _on_line(place: int, num: int, block: int, key: np.uint64) -> int:
    """The sample at a place of an epoch's line of permuted blocks."""
    num_blocks = num // block
    if place < num_blocks * block:
        place = _place(place // block, num_blocks, derive(key, _BLOCKS)) * block + place % block
    start = np.int64(derive(key, _START) % np.uint64(num))
    return (place + start) % num


@inlined
def _part(position: int, table: OrderTable) -> tuple[int, int]:
    """The part of a stream position, and the position in that part's own stream."""
    lane, turn = position % table.num_lanes, position // table.num_lanes
    cycle = turn // CYCLE
    key = derive(derive(table.keys[-1], np.uint64(lane)), np.uint64(cycle))
    slot = _place(turn % CYCLE, CYCLE, key)
    part = np.searchsorted(table.cycle_ends, slot, side="right")
    first = table.cycle_ends[part - 1] if part else 0
    turn = cycle * (table.cycle_ends[part] - first) + slot - first
    return np.int64(part), turn * table.num_lanes + lane


@compiled
def places(
    step: int, first_row: int, table: OrderTable, epochs: np.ndarray, samples: np.ndarray
) -> None:
    """Fill epochs, samples uint64 [B] for rows first_row .. first_row + B - 1 of batch `step`."""
    num_parts = len(table.num_samples)
    rows_per_lane = table.global_batch_size // table.num_lanes
    for i in range(len(samples)):
        row = first_row + i
        position = step * table.global_batch_size
        if table.uses_lanes or num_parts > 1:
            # Rows of one lane stand together, so that a rank's rows come from few lanes.
            position += row % rows_per_lane * table.num_lanes + row // rows_per_lane
        else:
            position += row
        part = 0
        if num_parts > 1:
            part, position = _part(position, table)
        num = table.num_samples[part]
        epoch = position // num
        key = derive(table.keys[part], np.uint64(epoch))
        if table.uses_lanes:
            _, window, index, low, high = _window(position, num, table)
            lane_key = derive(key, _WINDOWS + np.uint64(position % table.num_lanes))
            index = _place(index, high - low, derive(lane_key, np.uint64(window)))
            sample = _on_line(low + index, num, table.block, key)
        else:
            sample = _place(position % num, num, key)
        epochs[i] = np.uint64(epoch)
        samples[i] = np.uint64(table.first_samples[part] + sample)


@compiled
def line_samples(part: int, epoch: int, low: int, high: int, table: OrderTable) -> np.ndarray:
    """The samples at places low .. high - 1 of an epoch's line, as runs that lie together on disk.

    int64 [runs, 2], begins and ends; at most a window's places.
    """
    num = table.num_samples[part]
    key = derive(table.keys[part], np.uint64(epoch))
    runs = np.empty((2 * BLOCKS_PER_WINDOW + 6, 2), dtype=np.int64)
    num_runs = 0
    place = low
    while place < high:
        end = min(high, (place // table.block + 1) * table.block)
        begin = _on_line(place, num, table.block, key)
        until_end = min(end - place, num - begin)
        runs[num_runs] = begin, begin + until_end
        num_runs += 1
        if until_end < end - place:  # over the corpus's end to its beginning
            runs[num_runs] = 0, end - place - until_end
            num_runs += 1
        place = end
    return runs[:num_runs] + table.first_samples[part]


@inlined
def _turns_at(step: int, part: int, table: OrderTable) -> tuple[int, int]:
    """First and last of a part's turns, in each lane, that may come up in batch `step`."""
    rows_per_lane = table.global_batch_size // table.num_lanes
    first, last = step * rows_per_lane, (step + 1) * rows_per_lane - 1
    if len(table.num_samples) > 1:
        share = table.cycle_ends[part] - (table.cycle_ends[part - 1] if part else 0)
        first, last = first // CYCLE * share, (last // CYCLE + 1) * share - 1
    return first, last


@compiled
def windows_at(
    step: int, first_lane: int, num_lanes: int, ahead: int, table: OrderTable
) -> np.ndarray:
    """The windows that some lanes need for batch `step`, and soon: int64 [parts, lanes, 3, 4].

    Part, epoch, begin and end on the epoch's line: of the windows of the step's first and last
    position, and of the position `ahead` turns later.
    """
    num_parts = len(table.num_samples)
    result = np.empty((num_parts, num_lanes, 3, 4), dtype=np.int64)
    for part in range(num_parts):
        first, last = _turns_at(step, part, table)
        for i in range(num_lanes):
            for k, turn in enumerate((first, last, last + ahead)):
                position = turn * table.num_lanes + first_lane + i
                epoch, _, _, low, high = _window(position, table.num_samples[part], table)
                result[part, i, k] = part, epoch, low, high
    return result


def samples_taken(step: int, table: OrderTable) -> np.ndarray:
    """Samples of each part in the batches before `step`, exactly: int64 [parts]."""
    turns = step * (table.global_batch_size // table.num_lanes)
    taken = turns // CYCLE * np.diff(table.cycle_ends, prepend=0) * table.num_lanes
    return taken + _started_cycles(turns, table)


@compiled
def _started_cycles(turns: int, table: OrderTable) -> np.ndarray:
    """Of every lane's `turns` positions, those in its unfinished cycle, by part: int64 [parts]."""
    counts = np.zeros(len(table.num_samples), dtype=np.int64)
    for lane in range(table.num_lanes):
        for turn in range(turns // CYCLE * CYCLE, turns):
            part, _ = _part(turn * table.num_lanes + lane, table)
            counts[part] += 1
    return counts
