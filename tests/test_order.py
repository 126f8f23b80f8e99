"""The order: each sample once per epoch, exact shares, what lanes read, and fixed digests."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_ds.data.stream.order import (
    BLOCKS_PER_WINDOW,
    CYCLE,
    OrderTable,
    line_samples,
    order_table,
    places,
    samples_taken,
    windows_at,
)


def make(
    nums: list[int],
    batch: int,
    lanes: bool,
    block: int,
    shares: list[int] | None = None,
    key: int = 5,
) -> OrderTable:
    shares = [CYCLE] if shares is None else shares
    return order_table(np.array(nums), np.array(shares), batch, lanes, block, np.uint64(key))


def take(table: OrderTable, first_step: int, end_step: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and samples of whole batches, in the stream's order."""
    steps = range(first_step, end_step)
    epochs, samples = np.empty((2, len(steps), table.global_batch_size), dtype=np.uint64)
    for i, step in enumerate(steps):
        places(step, 0, table, epochs[i], samples[i])
    return epochs.ravel().astype(np.int64), samples.ravel().astype(np.int64)


@settings(max_examples=100, deadline=None)
@given(
    num=st.integers(1, 3000),
    batch=st.integers(1, 200),
    lanes=st.booleans(),
    block=st.integers(1, 60),
    key=st.integers(0, (1 << 64) - 1),
)
def test_each_sample_once_an_epoch(num: int, batch: int, lanes: bool, block: int, key: int) -> None:
    """Also for corpora smaller than a batch, a lane or a block, and with a shorter last block."""
    epochs, samples = take(make([num], batch, lanes, block, key=key), 0, 2 * num // batch + 1)
    for epoch in (0, 1):
        assert np.array_equal(np.sort(samples[epochs == epoch]), np.arange(num))
    # An epoch ends before the next one begins, except in the batch that has samples of both.
    assert (epochs[: num // batch * batch] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    step=st.integers(0, 10**12),
    batch=st.sampled_from([6, 64, 192]),
    lanes=st.booleans(),
    num=st.integers(1, 10**10),
    mixed=st.booleans(),
)
def test_any_rows_of_any_step_by_themselves(
    step: int, batch: int, lanes: bool, num: int, mixed: bool
) -> None:
    """The rows that ranks compute on their own, at any step, are those of the whole batch."""
    nums, shares = ([num, 77], [600, 400]) if mixed else ([num], [CYCLE])
    table = make(nums, batch, lanes, 4161, shares)
    epochs, samples = take(table, step, step + 1)
    for world_size in (1, 2, 3, 6) if batch == 6 else (1, 2, 4, 8, 64):
        size = batch // world_size
        for rank in range(world_size):
            rows = slice(rank * size, (rank + 1) * size)
            own_epochs, own_samples = np.empty((2, size), dtype=np.uint64)
            places(step, rank * size, table, own_epochs, own_samples)
            assert np.array_equal(own_epochs, epochs[rows].astype(np.uint64))
            assert np.array_equal(own_samples, samples[rows].astype(np.uint64))


@settings(max_examples=30, deadline=None)
@given(
    share=st.integers(1, CYCLE - 1),
    lanes=st.booleans(),
    nums=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    batch=st.sampled_from([1, 8, 20]),
)
def test_mixture_shares_and_epochs_are_exact(
    share: int, lanes: bool, nums: tuple[int, int], batch: int
) -> None:
    table = make(list(nums), batch, lanes, 7, [share, CYCLE - share])
    cycle_steps = CYCLE * table.num_lanes // batch
    epochs, samples = take(table, 0, 2 * cycle_steps)
    is_second = samples >= nums[0]
    for steps in (1, cycle_steps // 3, cycle_steps, 2 * cycle_steps):
        counted = np.bincount(is_second[: steps * batch].astype(int), minlength=2)
        assert samples_taken(steps, table).tolist() == counted.tolist()
    exact = np.array([share, CYCLE - share]) * table.num_lanes
    assert samples_taken(cycle_steps, table).tolist() == exact.tolist()
    for corpus, num in enumerate(nums):
        own = is_second == bool(corpus)
        first = corpus * nums[0]
        for epoch in range(int(2 * exact[corpus]) // num):
            seen = np.sort(samples[own & (epochs == epoch)])
            assert np.array_equal(seen, np.arange(first, first + num))


def test_corpora_are_spread_evenly_within_a_cycle() -> None:
    """No long runs of one corpus: the counts in batches of 256 vary as those of fair draws do."""
    table = make([10**6, 10**6], 256, False, 1, [300, 700])
    _, samples = take(table, 0, 400)
    counts = (samples.reshape(-1, 256) < 10**6).sum(axis=1)
    assert abs(counts.mean() - 256 * 0.3) < 1
    assert counts.std() < 1.2 * math.sqrt(256 * 0.3 * 0.7)


def read_in_lanes(table: OrderTable, steps: int, first: int, num: int) -> Counter[int]:
    """How often each sample is read for some lanes, window by window, as ReadAhead does."""
    windows: dict[tuple[int, ...], None] = {}
    for step in range(steps):
        at = windows_at(step, first, num, table.block, table)[:, :, :2].reshape(-1, 4)
        windows.update(dict.fromkeys(map(tuple, at.tolist())))
    read: Counter[int] = Counter()
    for window in windows:
        if window[1] == 0:
            for begin, end in line_samples(*window, table).tolist():
                read.update(range(begin, end))
    return read


@pytest.mark.parametrize("world_size", [1, 4, 64])
def test_lanes_read_each_sample_once(world_size: int) -> None:
    """Read amplification is 1: each sample is in exactly one window of all ranks per epoch."""
    num, batch, block = 40_000, 64, 13
    table = make([num], batch, True, block)
    lanes = table.num_lanes // world_size
    read: Counter[int] = Counter()
    for rank in range(world_size):
        read += read_in_lanes(table, num // batch + 1, rank * lanes, lanes)
    assert read == Counter(range(num))


def test_lanes_announce_what_they_take() -> None:
    """A batch's samples are in the windows of its step, which an earlier step announced."""
    table = make([100_000], 128, True, 50)
    asked: set[tuple[int, ...]] = set()
    for step in range(700):
        at = windows_at(step, 0, 64, table.block, table)
        needed = set(map(tuple, at[:, :, :2].reshape(-1, 4).tolist()))
        if step > 0:
            assert needed <= asked
        asked = needed | set(map(tuple, at[:, :, 2].reshape(-1, 4).tolist()))
        if step % 50 == 0:
            runs = np.concatenate([line_samples(*window, table) for window in needed])
            samples = take(table, step, step + 1)[1][:, None]
            assert ((runs[:, 0] <= samples) & (samples < runs[:, 1])).any(axis=1).all()
            # The bound on memory: one window per lane, and the next window of some lanes.
            assert len(asked) <= 64 * 1.5


def test_lanes_shuffle_well() -> None:
    """By correlation with the corpus's order, distance of neighbours, and spread of a batch."""
    num, batch, block = 200_000, 256, 100
    table = make([num], batch, True, block)
    _, samples = take(table, 0, num // batch)
    order = np.arange(len(samples))
    assert abs(np.corrcoef(order, samples)[0, 1]) < 0.02  # 0.0022 is the deviation of a shuffle
    # Uniform positions differ by num / 3 on average; here those of neighbouring lanes.
    displacement = np.abs(np.diff(samples[:: batch // 64])).mean()
    assert displacement == pytest.approx(num / 3, rel=0.05)
    # The samples of a batch come from nearly as many blocks as possible.
    blocks = [len(np.unique(row // block)) for row in samples.reshape(-1, batch)]
    assert np.mean(blocks) > 0.75 * min(batch, 64 * BLOCKS_PER_WINDOW)
    # Samples that are neighbours on disk are rarely in the same batch.
    at = np.empty(num, dtype=np.int64)
    at[:] = -1
    at[samples] = order // batch
    assert (at[1:] == at[:-1]).mean() < 0.02
    # The next epoch has another order.
    _, later = take(table, num // batch + 1, 2 * num // batch)
    assert abs(np.corrcoef(samples[: len(later)], later)[0, 1]) < 0.02


def test_orders_never_change() -> None:
    """A run that resumes under a later version must find its samples: digests of 2026-11-22."""
    digests = []
    for lanes, nums, shares in (
        (False, [1_000_003], [CYCLE]),
        (True, [1_000_003], [CYCLE]),
        (False, [1_000_003, 999], [250, 750]),
        (True, [1_000_003, 999], [250, 750]),
    ):
        table = make(nums, 192, lanes, 4161, shares, key=0x1234_5678_9ABC_DEF0)
        taken = [np.stack(take(table, step, step + 2)) for step in (0, 5_000, 10**9)]
        data = np.concatenate(taken, axis=1).astype("<u8").tobytes()
        digests.append(hashlib.sha256(data).hexdigest()[:16])
    assert digests == [
        "076743fb11b2f246",
        "b2b98556f7d6f725",
        "ca63edc8a82059c3",
        "b5cef778de1801a9",
    ]
