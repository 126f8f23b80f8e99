"""The order of the stream: which sample stands at each position, in which epoch.

Position p is sample permute(p mod N) of epoch p div N, a keyed permutation of range(N) that is new
in each epoch: each sample exactly once an epoch, found in constant time and memory. What sample i
of a corpus is (samples.py) and which rows a rank takes (sampler.py) is not known here.

Rejected: a shuffled index list (8 bytes a sample a process, and minutes to make at a billion
samples), a balanced Feistel network (its domain is a power of four, so up to three of four indices
are walked over; two radices near the root of N walk over almost none).
"""

from __future__ import annotations

import math

import numpy as np

from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled, inlined

NUM_ROUNDS = 6
_HALF = np.uint64(32)


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


@compiled
def shuffled(
    position: int,
    num_samples: int,
    order_key: np.uint64,
    epochs: np.ndarray,
    samples: np.ndarray,
) -> None:
    """Fill epochs, samples uint64 [B] for the stream positions position .. position + B - 1."""
    num = np.uint64(num_samples)
    for row in range(len(samples)):
        place = np.uint64(position + row)
        epoch = place // num
        epochs[row] = epoch
        samples[row] = _permute(place % num, num, derive(order_key, epoch))
