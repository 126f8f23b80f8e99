"""The order of the stream: which sample is at each position, and in which epoch.

Samples are numbered through the shards in file order. What a sample is (samples.py) and which rows
a rank takes (sample_stream.py) is not known here. There are two orders. Both are pure functions of
the position, computed in constant time and memory, with each sample exactly once per epoch:

- shuffle: position p is sample permute(p mod N) of epoch p div N, where permute is a keyed
  permutation of range(N), another one in each epoch. Reads are random, so it is for a corpus that
  fits into memory.
- lanes: reads are sequential, for a corpus that does not fit. Beginning at a keyed start, the N
  samples of an epoch are cut into blocks of about 1 MiB. The blocks are permuted by key, and the
  line that they form is cut into num_lanes segments of equal length, one per lane. A lane reads its
  segment in windows of 8 blocks and permutes the samples inside each window. A batch takes the same
  number of rows from every lane; ranks divide the rows, and with them the lanes, among themselves.
  When N is no multiple of the block, the last block is shorter and stays at the end of the line;
  because of the keyed start it holds other samples in each epoch. Lanes enter their windows one
  after the other, so that reading is spread evenly over time. Any N works: a corpus smaller than
  one block has only the short block.

In a mixture, every lane chooses the corpus of each of its positions in cycles of 1000: each cycle
has exactly share * 1000 positions of each corpus, in an order that is new in each cycle. Every
corpus then has a stream, and epochs, of its own.

Rejected: a shuffled list of indices (8 bytes per sample in every process, and minutes to make for
a billion samples); a balanced Feistel network (its domain is a power of four, so up to three of
four results lie beyond N and are permuted again; two radices near the root of N leave almost none);
a shuffle buffer of samples (its content is a state that a resumed run would have to rebuild); lanes
that depend on the number of ranks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from clue_ds.data import sampling
from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled, inlined

NUM_ROUNDS = 6
BLOCK_BYTES = 1 << 20
BLOCKS_PER_WINDOW = 8
CYCLE = 1000  # positions of a lane in which the share of every corpus is exact

_HALF = np.uint64(32)
# Counters under the key of one epoch of a corpus. Lane i derives the key of its windows from
# _WINDOWS + i.
_START, _BLOCKS, _WINDOWS = np.uint64(0), np.uint64(1), np.uint64(2)
_CYCLES = np.uint64(1 << 62)  # beyond any epoch: its key orders the corpora of a mixture


class OrderTable(NamedTuple):
    """The numbers that define an order, in the form in which compiled code reads them."""

    global_batch_size: int
    num_lanes: int  # divides global_batch_size
    uses_lanes: bool
    block: int  # samples per block
    num_samples: np.ndarray  # int64 [corpora]
    first_samples: np.ndarray  # int64 [corpora]: number of the first sample of each
    cycle_ends: np.ndarray  # int64 [corpora]: positions of a cycle for the corpora up to this one
    keys: np.ndarray  # uint64 [corpora + 1]; the last one orders the cycles


def order_table(
    num_samples: np.ndarray,
    shares: np.ndarray,
    global_batch_size: int,
    uses_lanes: bool,
    block: int,
    order_key: np.uint64,
) -> OrderTable:
    """The order over corpora with these num_samples and shares of CYCLE, int64 [corpora]."""
    assert shares.sum() == CYCLE and (shares > 0).all() and (num_samples > 0).all() and block > 0
    return OrderTable(
        global_batch_size=global_batch_size,
        num_lanes=sampling.num_lanes(global_batch_size),
        uses_lanes=uses_lanes,
        block=block,
        num_samples=num_samples.astype(np.int64),
        first_samples=np.concatenate([[0], np.cumsum(num_samples)[:-1]]).astype(np.int64),
        cycle_ends=np.cumsum(shares).astype(np.int64),
        keys=corpus_keys(len(shares), np.uint64(order_key)),
    )


@compiled
def corpus_keys(num_corpora: int, order_key: np.uint64) -> np.ndarray:
    """Keys of the corpora, then of the cycles; a corpus by itself has the order's key."""
    keys = np.empty(num_corpora + 1, dtype=np.uint64)
    keys[0] = order_key
    keys[num_corpora] = derive(np.uint64(order_key), _CYCLES)
    if num_corpora > 1:
        for corpus in range(num_corpora):
            keys[corpus] = derive(keys[num_corpora], _CYCLES + np.uint64(corpus))
    return keys


@inlined
def _offset(key: np.uint64, value: np.uint64, radix: np.uint64) -> np.uint64:
    """A keyed pseudorandom function of `value`, below `radix` (which is below 2^32)."""
    return ((derive(key, value) >> _HALF) * radix) >> _HALF


@inlined
def _permute(index: np.uint64, num: np.uint64, key: np.uint64) -> np.uint64:
    """The place of `index` in a keyed permutation of range(num), by a Feistel network."""
    # An index is a pair of digits with two radices, both near the root of num.
    left_radix = np.uint64(math.ceil(math.sqrt(np.float64(num))))
    right_radix = (num + left_radix - np.uint64(1)) // left_radix
    while True:
        left, right = index // right_radix, index % right_radix
        # Each round adds to one digit an offset that depends on the other one. That can be undone,
        # so the rounds permute all pairs of digits.
        for round_number in range(NUM_ROUNDS):
            round_key = derive(key, np.uint64(round_number))
            if round_number % 2 == 0:
                left += _offset(round_key, right, left_radix)
                left -= left_radix if left >= left_radix else np.uint64(0)
            else:
                right += _offset(round_key, left, right_radix)
                right -= right_radix if right >= right_radix else np.uint64(0)
        index = left * right_radix + right
        # There are slightly more pairs than num. A result beyond num is permuted again: following
        # the permutation's cycle from an index below num always comes back below num, at an index
        # that no other one reaches first.
        if index < num:
            return index


@compiled
def permutation(num: int, key: np.uint64) -> np.ndarray:
    """The whole keyed permutation of range(num), int64 [num]: for tests with a small `num`."""
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
    """How many of the positions 0 .. position - 1 belong to lanes below `lane`.

    A position belongs to lane position mod num_lanes.
    """
    return position // num_lanes * lane + min(position % num_lanes, lane)


@inlined
def _window(position: int, num: int, table: OrderTable) -> tuple[int, int, int, int, int]:
    """Where a position of a corpus's own stream is read: (epoch, window, index, low, high).

    `window` counts the lane's windows in the epoch; it has the places low .. high - 1 of the
    epoch's line, and the position has place low + index before the window is permuted.
    """
    epoch = position // num
    lane = position % table.num_lanes
    first, end = epoch * num, (epoch + 1) * num
    # The lane's segment of the line, begin .. limit - 1, has a place for each of the lane's
    # positions in this epoch, and begins behind the segments of the lanes below.
    begin = _before(end, lane, table.num_lanes) - _before(first, lane, table.num_lanes)
    limit = _before(end, lane + 1, table.num_lanes) - _before(first, lane + 1, table.num_lanes)
    # How many of the lane's positions in this epoch come before this one.
    index = position // table.num_lanes - (first - lane + table.num_lanes - 1) // table.num_lanes
    # The segment is cut into windows of `size` places, but each lane's cuts are moved by a phase of
    # its own: lanes reach the end of a window, and read the next one, at different steps. The first
    # and the last window of a segment are therefore shorter.
    size = BLOCKS_PER_WINDOW * table.block
    phase = lane * size // table.num_lanes
    window = (index + phase) // size
    low = max(begin, begin + window * size - phase)
    high = min(limit, begin + (window + 1) * size - phase)
    return epoch, window, begin + index - low, low, high


@inlined
def _on_line(place: int, num: int, block: int, key: np.uint64) -> int:
    """The sample at a place of an epoch's line of permuted blocks, for the epoch's key."""
    num_blocks = num // block
    # Only full blocks are permuted; places behind them are the short block at the line's end.
    if place < num_blocks * block:
        place = _place(place // block, num_blocks, derive(key, _BLOCKS)) * block + place % block
    # Where the first block begins in the corpus; samples before it follow the corpus's last one.
    start = np.int64(derive(key, _START) % np.uint64(num))
    return (place + start) % num


@inlined
def _corpus_at(position: int, table: OrderTable) -> tuple[int, int]:
    """The corpus of a position of a mixture, and the position in that corpus's own stream."""
    # A lane's turns are its positions, counted by themselves.
    lane, turn = position % table.num_lanes, position // table.num_lanes
    cycle = turn // CYCLE
    key = derive(derive(table.keys[-1], np.uint64(lane)), np.uint64(cycle))
    # A cycle's turns are permuted to slots, and each corpus has a range of slots as long as its
    # share: each cycle holds the exact shares. The slot also says which of the corpus's own turns
    # this is; they go on from cycle to cycle without a gap.
    slot = _place(turn % CYCLE, CYCLE, key)
    corpus = np.searchsorted(table.cycle_ends, slot, side="right")
    first = table.cycle_ends[corpus - 1] if corpus else 0
    turn = cycle * (table.cycle_ends[corpus] - first) + slot - first
    return np.int64(corpus), turn * table.num_lanes + lane


@compiled
def places(
    step: int, first_row: int, table: OrderTable, epochs: np.ndarray, samples: np.ndarray
) -> None:
    """Fill epochs, samples uint64 [B] for rows first_row .. first_row + B - 1 of batch `step`."""
    num_corpora = len(table.num_samples)
    rows_per_lane = table.global_batch_size // table.num_lanes
    for i in range(len(samples)):
        row = first_row + i
        position = step * table.global_batch_size
        if table.uses_lanes or num_corpora > 1:
            # Rows of one lane are neighbours in the batch, so that a rank's rows come from few
            # lanes. In the stream, positions go round the lanes.
            position += row % rows_per_lane * table.num_lanes + row // rows_per_lane
        else:
            position += row
        corpus = 0
        if num_corpora > 1:
            corpus, position = _corpus_at(position, table)
        num = table.num_samples[corpus]
        epoch = position // num
        key = derive(table.keys[corpus], np.uint64(epoch))
        if table.uses_lanes:
            # The place in the window is permuted first; then the line's blocks, which were
            # permuted for all lanes together, give the sample.
            _, window, index, low, high = _window(position, num, table)
            lane_key = derive(key, _WINDOWS + np.uint64(position % table.num_lanes))
            index = _place(index, high - low, derive(lane_key, np.uint64(window)))
            sample = _on_line(low + index, num, table.block, key)
        else:
            sample = _place(position % num, num, key)
        epochs[i] = np.uint64(epoch)
        samples[i] = np.uint64(table.first_samples[corpus] + sample)


@compiled
def line_samples(corpus: int, epoch: int, low: int, high: int, table: OrderTable) -> np.ndarray:
    """The samples at places low .. high - 1 of an epoch's line, as runs of consecutive samples.

    Returns int64 [runs, 2], the first sample of each run and the one behind its last. There must
    not be more places than a window has.
    """
    num = table.num_samples[corpus]
    key = derive(table.keys[corpus], np.uint64(epoch))
    runs = np.empty((2 * BLOCKS_PER_WINDOW + 6, 2), dtype=np.int64)
    num_runs = 0
    place = low
    while place < high:
        # One block after the other: samples are consecutive inside a block only.
        end = min(high, (place // table.block + 1) * table.block)
        begin = _on_line(place, num, table.block, key)
        until_end = min(end - place, num - begin)
        runs[num_runs] = begin, begin + until_end
        num_runs += 1
        if until_end < end - place:  # the block goes on at the corpus's first sample
            runs[num_runs] = 0, end - place - until_end
            num_runs += 1
        place = end
    return runs[:num_runs] + table.first_samples[corpus]


@inlined
def _turns_at(step: int, corpus: int, table: OrderTable) -> tuple[int, int]:
    """The first and the last turn of a corpus, in each lane, that batch `step` may need."""
    rows_per_lane = table.global_batch_size // table.num_lanes
    first, last = step * rows_per_lane, (step + 1) * rows_per_lane - 1
    if len(table.num_samples) > 1:
        # Within a cycle the corpus's turns come in permuted order: any of them may be next.
        share = table.cycle_ends[corpus] - (table.cycle_ends[corpus - 1] if corpus else 0)
        first, last = first // CYCLE * share, (last // CYCLE + 1) * share - 1
    return first, last


@compiled
def windows_at(
    step: int, first_lane: int, num_lanes: int, ahead: int, table: OrderTable
) -> np.ndarray:
    """The windows that some lanes need for batch `step`, and soon: int64 [corpora, lanes, 3, 4].

    For each corpus and lane there are three windows: of the first and of the last turn that the
    step may need, and of the turn `ahead` of the last one. A window is given by its corpus, epoch,
    and begin and end on the epoch's line.
    """
    num_corpora = len(table.num_samples)
    result = np.empty((num_corpora, num_lanes, 3, 4), dtype=np.int64)
    for corpus in range(num_corpora):
        first, last = _turns_at(step, corpus, table)
        for i in range(num_lanes):
            for k, turn in enumerate((first, last, last + ahead)):
                position = turn * table.num_lanes + first_lane + i
                epoch, _, _, low, high = _window(position, table.num_samples[corpus], table)
                result[corpus, i, k] = corpus, epoch, low, high
    return result


def samples_taken(step: int, table: OrderTable) -> np.ndarray:
    """The exact number of samples of each corpus in the batches before `step`: int64 [corpora]."""
    turns = step * (table.global_batch_size // table.num_lanes)
    taken = turns // CYCLE * np.diff(table.cycle_ends, prepend=0) * table.num_lanes
    return taken + _started_cycles(turns, table)


@compiled
def _started_cycles(turns: int, table: OrderTable) -> np.ndarray:
    """Positions of each corpus in the unfinished cycles after `turns` turns: int64 [corpora]."""
    counts = np.zeros(len(table.num_samples), dtype=np.int64)
    for lane in range(table.num_lanes):
        for turn in range(turns // CYCLE * CYCLE, turns):
            corpus, _ = _corpus_at(turn * table.num_lanes + lane, table)
            counts[corpus] += 1
    return counts
