"""Documents that occur twice: exactly (by hash) or nearly (MinHash), the first one is kept.

Every worker writes 64-bit keys of its documents beside its shard: a hash of the text, and for near
duplicates one key a band of the MinHash signature (datasketch makes it). When all shards are
written, a document with a key that an earlier document had is marked, and the shards that hold
marked ones are written again without them. So the answer is the same for any number of processes,
standard input is read once, and an interrupted run goes on.

Memory doesn't grow with the number of documents: keys and marks lie in files, and a part of the
keys (KEYS_PER_PASS) is compared at a time. Two different documents among a hundred million share a
64-bit hash with a chance of 1 in 3,700.
Rejected: a set of hashes in one process (100 bytes a document, and the pool would wait for it) and
datasketch's MinHashLSH as the index (all signatures in memory, some kilobytes a document).
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
# Datasketch takes 512 bytes a shingle of a batch, and a document may have ten million.
BATCH_SHINGLES = 1 << 12
# Keys that are compared at a time, in a table of 128 MiB. More documents take more passes over the
# files: a hundred million take 12, of a second or two each, and ten times that for near duplicates.
KEYS_PER_PASS = 1 << 23


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
        last = max(begin + 1, end - SHINGLE_TOKENS + 1)  # behind the first token of a shingle
        for first in range(begin, last, BATCH_SHINGLES):
            until = min(first + BATCH_SHINGLES + SHINGLE_TOKENS - 1, end)
            signature.update_batch(_shingles(ids[first:until]).tolist())
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


def find_duplicates(files: list[Path], cleaning: Cleaning) -> None:
    """Write beside each of `files` why its documents are dropped, for `reasons_beside`.

    files: in the order of the input, as np.save wrote them: uint64 [1 + bands, documents], a hash
    of the text, then near_keys.
    """
    shapes = [_rows(file).shape for file in files]
    for file, (_, num_documents) in zip(files, shapes, strict=True):
        np.save(_reasons_file(file), np.zeros(num_documents, dtype=np.uint8))
    total = sum(num_documents for _, num_documents in shapes)
    num_passes = max(1, -(-total // KEYS_PER_PASS))
    # At least half of it stays free: a pass has KEYS_PER_PASS keys, give or take some thousands.
    seen = np.empty(1 << max(10, (2 * min(total, KEYS_PER_PASS) - 1).bit_length()), dtype=np.uint64)
    for row in range(0 if cleaning.duplicates else 1, max(shapes, default=(0, 0))[0]):
        for pass_index in range(num_passes):
            seen[:] = 0
            for file in (file for file, (_, num) in zip(files, shapes, strict=True) if num):
                reasons = reasons_beside(file)
                code = NEAR_DUPLICATE if row else DUPLICATE
                if _mark_repeats(
                    np.array(_rows(file)[row]), pass_index, num_passes, code, seen, reasons
                ):
                    np.save(_reasons_file(file), reasons)


def reasons_beside(file: Path) -> np.ndarray:
    """Why each document of one of `find_duplicates`' files is dropped, uint8 [documents]."""
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
    """Give documents whose key is in `seen` the reason `code`; whether there were any.

    keys: of consecutive documents, of which those of the pass count; seen: a hash table, as long as
    a power of two, to which they are added; 0 is an empty place.
    """
    found = False
    last = np.uint64(len(seen) - 1)
    for document in range(len(keys)):
        key = keys[document]
        if (key >> np.uint64(32)) % np.uint64(num_passes) != np.uint64(pass_index):
            continue
        key = max(key, np.uint64(1))
        place = key & last
        while seen[place] != 0 and seen[place] != key:
            place = (place + np.uint64(1)) & last
        if seen[place] == 0:
            seen[place] = key
        elif reasons[document] == KEPT:
            reasons[document] = code
            found = True
    return found
