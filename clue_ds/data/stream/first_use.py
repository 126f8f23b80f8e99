"""Compiled code that finds which pieces of a corpus a batch uses for the first time.

verification.py compares a piece with its checksum once per process. Until all pieces have been
compared, `Samples.rows` asks here for those that its samples touch and that are still to be
compared. The ranges may be larger than what a sample reads, never smaller.
"""

from __future__ import annotations

import numpy as np

from clue_ds.data.jit import compiled, inlined
from clue_ds.data.stream.pointers import mapped
from clue_ds.data.stream.tables import Index, Pieces


@inlined
def _shard_of(sample: int, first_samples: np.ndarray) -> int:
    return np.searchsorted(first_samples, sample, side="right") - 1


@inlined
def _piece_of(token: int, shard: int, pieces: Pieces) -> int:
    offset = pieces.first_token + token * pieces.token_bytes
    return pieces.first_pieces[shard] + offset // pieces.piece_bytes


@inlined
def _missing(ranges: np.ndarray, is_compared: np.ndarray) -> np.ndarray:
    """The pieces in `ranges`, int64 [B, 2] with both ends included, that are to be compared."""
    num = 0
    for b in range(len(ranges)):
        for piece in range(ranges[b, 0], ranges[b, 1] + 1):
            num += is_compared[piece] == 0
    found = np.empty(num, np.int64)
    if num:
        num = 0
        for b in range(len(ranges)):
            for piece in range(ranges[b, 0], ranges[b, 1] + 1):
                if is_compared[piece] == 0:
                    found[num] = piece
                    num += 1
    return found


@compiled
def missing_of_windows(
    samples: np.ndarray,
    first_samples: np.ndarray,
    num_tokens: np.ndarray,
    window: int,
    pieces: Pieces,
) -> np.ndarray:
    """The pieces, to be compared, of some windows; a piece may come several times."""
    ranges = np.empty((len(samples), 2), np.int64)
    for b in range(len(samples)):
        sample = np.int64(samples[b])
        shard = _shard_of(sample, first_samples)
        begin = (sample - first_samples[shard]) * window
        end = min(begin + window, num_tokens[shard])
        ranges[b, 0] = _piece_of(begin, shard, pieces)
        ranges[b, 1] = _piece_of(end - 1, shard, pieces)
    return _missing(ranges, pieces.is_compared)


@compiled
def missing_of_sequences(
    samples: np.ndarray,
    index: Index,
    num_tokens: np.ndarray,
    stride: int,
    reach: int,
    pieces: Pieces,
) -> np.ndarray:
    """The same for samples that follow sentence ends, with the tables of their shards.

    The index has a mark every `stride` samples. Samples are read with others of the same `reach`
    samples of their shard, a multiple of `stride`.
    """
    ranges = np.empty((2 * len(samples), 2), np.int64)
    for b in range(len(samples)):
        sample = np.int64(samples[b])
        shard = _shard_of(sample, index.first_samples)
        first = index.first_samples[shard]
        num = index.first_samples[shard + 1] - first
        low = (sample - first) // reach * reach
        marks = mapped(index.marks[shard], (num + stride - 1) // stride * 3, index.like)
        begin = np.int64(marks[low // stride * 3])
        end = num_tokens[shard]
        if low + reach < num:
            end = np.int64(marks[(low + reach) // stride * 3])
        ranges[2 * b, 0] = _piece_of(begin, shard, pieces)
        ranges[2 * b, 1] = _piece_of(end - 1, shard, pieces)
        # The tables of the shard are compared together.
        ranges[2 * b + 1, 0] = _piece_of(num_tokens[shard], shard, pieces)
        ranges[2 * b + 1, 1] = ranges[2 * b + 1, 0] - 1
        if pieces.has_tables_compared[shard] == 0:
            ranges[2 * b + 1, 1] = pieces.first_pieces[shard + 1] - 1
    return _missing(ranges, pieces.is_compared)
