"""The counter-based generator behind sample order and masks: splitmix64's finaliser, keyed.

`mix` is a bijection of 64-bit numbers whose output passes statistical tests even when its inputs
are consecutive numbers; `derive` chains it, so that a number which depends on (seed, epoch, sample,
position) takes four mixes and no state. Rejected: Philox, which is stronger than shuffling and
masking need and three times the work on a CPU. Samples and masks of every run, and the machine code
that numba has cached (jit.py), depend on the results: never change them.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014); constants of
Stafford's variant 13.
"""

from __future__ import annotations

import numba
import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


@numba.njit(nogil=True, inline="always")
def mix(value: np.uint64) -> np.uint64:
    """A pseudorandom bijection of 64-bit numbers."""
    value = (value ^ (value >> _SHIFT_1)) * _MULTIPLIER_1
    value = (value ^ (value >> _SHIFT_2)) * _MULTIPLIER_2
    return value ^ (value >> _SHIFT_3)


@numba.njit(nogil=True, inline="always")
def derive(key: np.uint64, counter: np.uint64) -> np.uint64:
    """The key that belongs to `counter` under `key`."""
    return mix(key + (counter + np.uint64(1)) * GOLDEN)
