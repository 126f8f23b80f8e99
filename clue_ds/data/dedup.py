"""Documents that occur twice: exactly (by hash) or nearly (MinHash), the first one is kept.

Every worker writes 64-bit keys of its documents beside its shard: a hash of the text, and for near
duplicates one key a band of the MinHash signature (datasketch makes it). When all shards are
written, a document with a key that an earlier document had is marked, and the shards that hold
marked ones are written again without them. So the answer is the same for any number of processes,
standard input is read once, and an interrupted run goes on.

Memory: a byte a document, and a part of the keys at a time (PART_KEYS). Two different documents
among a hundred million share a 64-bit hash with a chance of 1 in 3,700.
Rejected: a set of hashes in one process (100 bytes a document, and the pool would wait for it) and
datasketch's MinHashLSH as the index (all signatures in memory, some kilobytes a document).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled
from clue_ds.data.options import DUPLICATE, KEPT, NEAR_DUPLICATE, Cleaning
from clue_ds.data.shards import ShardArrays

NUM_HASHES = 128
SHINGLE_TOKENS = 5
# Keys that are sorted at once: 64 MiB of them, and about four times that while sorting.
PART_KEYS = 1 << 23


def similarity_bands(similarity: float) -> tuple[int, int]:
    """Bands, and hashes a band, for which documents so similar are as likely found as not."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=similarity, num_perm=NUM_HASHES)
    return index.b, index.r


def near_keys(arrays: ShardArrays, continues: int, similarity: float) -> np.ndarray:
    """uint64 [bands, documents]: documents that share one are probably `similarity` alike.

    Alike means the Jaccard similarity of their sets of SHINGLE_TOKENS consecutive token ids.
    """
    from datasketch import MinHash

    num_bands, num_rows = similarity_bands(similarity)
    empty = MinHash(NUM_HASHES, hashfunc=int, scheme="affine32")
    ids = arrays.tokens & (continues - 1)
    ends = np.concatenate([[0], arrays.sentence_ends])[arrays.document_ends]
    keys = np.empty((num_bands, len(ends)), dtype=np.uint64)
    begin = 0
    for document, end in enumerate(ends):
        signature = empty.copy()
        signature.update_batch(np.unique(_shingles(ids[begin:end])).tolist())
        bands = signature.hashvalues[: num_bands * num_rows].reshape(num_bands, num_rows)
        keys[:, document] = _fold(bands.astype(np.uint64))
        begin = end
    return keys


@compiled
def _shingles(ids: np.ndarray) -> np.ndarray:
    """Hashes below 2^32 of all runs of SHINGLE_TOKENS ids; of the whole where it is shorter."""
    length = min(SHINGLE_TOKENS, len(ids))
    result = np.empty(len(ids) - length + 1, dtype=np.uint64)
    for begin in range(len(result)):
        key = np.uint64(0)
        for i in range(begin, begin + length):
            key = derive(key, np.uint64(ids[i]))
        result[begin] = key >> np.uint64(32)
    return result


@compiled
def _fold(rows: np.ndarray) -> np.ndarray:
    result = np.zeros(len(rows), dtype=np.uint64)
    for row in range(len(rows)):
        for value in rows[row]:
            result[row] = derive(result[row], value)
    return result


def find_duplicates(files: list[Path], cleaning: Cleaning) -> list[np.ndarray]:
    """Why each document is dropped, uint8 [documents] for each of `files`, in their order.

    files: as np.save wrote them, uint64 [1 + bands, documents]: a hash of the text, then near_keys.
    """
    sizes = [_rows(file).shape[1] for file in files]
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    reasons = np.zeros(starts[-1], dtype=np.uint8)
    num_rows = _rows(files[0]).shape[0] if files else 0
    num_parts = max(1, -(-len(reasons) // PART_KEYS))
    for row in range(0 if cleaning.duplicates else 1, num_rows):
        for part in range(num_parts):
            keys, places = _gather(files, starts, row, part, num_parts)
            order = np.argsort(keys, kind="stable")  # of equal keys the first document is first
            is_repeat = keys[order][1:] == keys[order][:-1]
            repeats = places[order[1:][is_repeat]]
            repeats = repeats[reasons[repeats] == KEPT]
            reasons[repeats] = NEAR_DUPLICATE if row else DUPLICATE
    return np.split(reasons, starts[1:-1]) if files else []


def _rows(file: Path) -> Any:
    return np.load(file, mmap_mode="r")


def _gather(
    files: list[Path], starts: np.ndarray, row: int, part: int, num_parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The keys of one row that fall into a part, and the numbers of their documents."""
    keys: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for file, start in zip(files, starts[:-1], strict=True):
        of_file = np.array(_rows(file)[row])
        is_in_part = (of_file >> np.uint64(32)) % np.uint64(num_parts) == part
        keys.append(of_file[is_in_part])
        places.append(start + np.flatnonzero(is_in_part))
    return np.concatenate(keys), np.concatenate(places)
