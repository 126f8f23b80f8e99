"""Duplicate documents, exact (by hash) or near (by MinHash); the first of them is kept.

For each shard a worker writes a file with 64-bit keys of its documents: a hash of the text, and for
near duplicates one key per band of the MinHash signature, which datasketch computes. When all
shards are written, every document that shares a key with an earlier document is marked, and shards
with marked documents are written again without them. So the result doesn't depend on the number of
processes, standard input is read only once, and an interrupted run can be resumed.

Memory doesn't grow with the number of documents: keys and marks are in files, and one pass over the
files compares about KEYS_PER_PASS of the keys. The chance that any two different documents among a
hundred million share a 64-bit hash is 1 in 3,700.
Rejected: a set of hashes in one process (100 bytes per document, and the other workers would wait)
and datasketch's MinHashLSH as the index (all signatures in memory, some kilobytes per document).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clue_ds.data.build.options import DUPLICATE, KEPT, NEAR_DUPLICATE, Cleaning
from clue_ds.data.corpus import ShardArrays
from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled

NUM_HASHES = 128
SHINGLE_TOKENS = 5
# Shingles that are hashed at a time: datasketch needs 512 bytes for each, and a document may have
# ten million.
BATCH_SHINGLES = 1 << 12
# Keys that one pass compares, in a table of 128 MiB. A hundred million documents take 12 passes
# over the files, of a second or two each, and ten times as many for near duplicates.
KEYS_PER_PASS = 1 << 23


def similarity_bands(similarity: float) -> tuple[int, int]:
    """(bands, hashes per band) with which documents of this similarity are found half the time."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=similarity, num_perm=NUM_HASHES)
    return index.b, index.r


def near_keys(arrays: ShardArrays, continues: int, similarity: float) -> np.ndarray:
    """uint64 [bands, documents]: documents that share a key are probably at least this similar.

    Similarity is the Jaccard similarity of their sets of shingles, which are runs of SHINGLE_TOKENS
    token ids.
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
        # First tokens of shingles are begin .. last - 1; a shorter document has one shingle.
        last = max(begin + 1, end - SHINGLE_TOKENS + 1)
        for first in range(begin, last, BATCH_SHINGLES):
            until = min(first + BATCH_SHINGLES + SHINGLE_TOKENS - 1, end)
            signature.update_batch(_shingles(ids[first:until]).tolist())
        bands = signature.hashvalues[: num_bands * num_rows].reshape(num_bands, num_rows)
        keys[:, document] = _fold(bands.astype(np.uint64))
        begin = end
    return keys


@compiled
def _shingles(ids: np.ndarray) -> np.ndarray:
    """uint64 [shingles]: hashes below 2^32 of all shingles of `ids`, or of all ids if too few."""
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
    """uint64 [rows]: one key for the values of each row."""
    result = np.zeros(len(rows), dtype=np.uint64)
    for row in range(len(rows)):
        for value in rows[row]:
            result[row] = derive(result[row], value)
    return result


def find_duplicates(files: list[Path], cleaning: Cleaning) -> None:
    """Write a file beside each of `files` with the reasons why its documents are dropped.

    files: in the order of the input, each written by np.save: uint64 [1 + bands, documents], the
    hashes of the texts, then near_keys. `reasons_beside` reads the result.
    """
    shapes = [_rows(file).shape for file in files]
    for file, (_, num_documents) in zip(files, shapes, strict=True):
        np.save(_reasons_file(file), np.zeros(num_documents, dtype=np.uint8))
    total = sum(num_documents for _, num_documents in shapes)
    num_passes = max(1, -(-total // KEYS_PER_PASS))
    # At least about half of it stays free: a pass has KEYS_PER_PASS keys, plus or minus thousands.
    seen = np.empty(1 << max(10, (2 * min(total, KEYS_PER_PASS) - 1).bit_length()), dtype=np.uint64)
    for row in range(0 if cleaning.duplicates else 1, max(shapes, default=(0, 0))[0]):
        for pass_index in range(num_passes):
            # One pass: this row of every file, in the order of the input, for one class of keys.
            seen[:] = 0
            for file in (file for file, (_, num) in zip(files, shapes, strict=True) if num):
                reasons = reasons_beside(file)
                code = NEAR_DUPLICATE if row else DUPLICATE
                if _mark_repeats(
                    np.array(_rows(file)[row]), pass_index, num_passes, code, seen, reasons
                ):
                    np.save(_reasons_file(file), reasons)


def reasons_beside(file: Path) -> np.ndarray:
    """uint8 [documents]: why each document of a file given to `find_duplicates` is dropped."""
    reasons: np.ndarray = np.load(_reasons_file(file))
    return reasons


def _reasons_file(file: Path) -> Path:
    return file.with_name(f"reasons-of-{file.name}")


def _rows(file: Path) -> Any:
    return np.load(file, mmap_mode="r")


@compiled
def _mark_repeats(
    keys: np.ndarray,
    pass_index: int,
    num_passes: int,
    code: int,
    seen: np.ndarray,
    reasons: np.ndarray,
) -> bool:
    """Give documents whose key is in `seen` the reason `code`; return whether there were any.

    keys: uint64 [documents], of which only those that belong to the pass are compared and added to
    seen: uint64 [a power of two], a hash table in which 0 is an empty place.
    """
    found = False
    last = np.uint64(len(seen) - 1)
    for document in range(len(keys)):
        key = keys[document]
        if (key >> np.uint64(32)) % np.uint64(num_passes) != np.uint64(pass_index):
            continue
        key = max(key, np.uint64(1))
        place = key & last
        # Linear probing, from the last place on to the first.
        while seen[place] != 0 and seen[place] != key:
            place = (place + np.uint64(1)) & last
        if seen[place] == 0:
            seen[place] = key
        elif reasons[document] == KEPT:
            reasons[document] = code
            found = True
    return found
