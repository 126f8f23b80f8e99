"""The checksums of a corpus's shards, one for each piece of 32 KiB, and the file that holds them.

A checksum is the sum, modulo 2^64, of the piece's 32-bit words, each times an odd factor that
follows from its place (docs/shard-format.md). Guarantees: a change within one word, so any flipped
bit, changes it; other changes leave it as it was with a probability of 2^-32 or less. It is as fast
as memory is read. Rejected: CRC-32 of zlib, which takes a second per GB where zlib is built without
special instructions: with a lanes order that is a third of the time that making batches takes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clue_ds.data import derived
from clue_ds.data.corpus import CHECKSUMS, Corpus
from clue_ds.data.derived import DerivedFile, say
from clue_ds.data.jit import compiled

# Linux maps 64 KiB around a touched page. Smaller pieces take more calls, larger ones more reading
# for a single sample.
PIECE_BYTES = 1 << 15
_MAGIC = b"CLUE-CS\x01"


@compiled
def _add_up(words: np.ndarray, sums: np.ndarray, words_a_piece: int) -> None:
    for piece in range(len(sums)):
        part = words[piece * words_a_piece : (piece + 1) * words_a_piece]
        total = np.uint64(0)
        for i in range(len(part)):
            # An odd factor: no change of a single word leaves the sum as it was.
            factor = np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1)
            total += np.uint64(part[i]) * factor
        sums[piece] = total


def checksums(data: np.ndarray) -> np.ndarray:
    """The checksums of the pieces of `data`, uint8 [4 n] that begins with a piece: uint64."""
    sums = np.empty(num_pieces(len(data)), np.uint64)
    _add_up(data.view("<u4"), sums, PIECE_BYTES // 4)
    return sums


def num_pieces(num_bytes: int) -> int:
    """The number of pieces that a shard of this size has."""
    return -(-num_bytes // PIECE_BYTES)


class PieceChecksums:
    """The checksums of a shard while it is written: `update` like a hash of hashlib."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._found: list[np.ndarray] = []

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        begin = min(len(view), -len(self._pending) % PIECE_BYTES)
        self._pending += view[:begin]
        end = begin + (len(view) - begin) // PIECE_BYTES * PIECE_BYTES
        if len(self._pending) == PIECE_BYTES:
            self._flush()
        if end > begin:
            self._found.append(checksums(np.frombuffer(view[begin:end], np.uint8)))
        self._pending += view[end:]

    def _flush(self) -> None:
        if self._pending:
            self._found.append(checksums(np.frombuffer(bytes(self._pending), np.uint8)))
            self._pending.clear()

    def result(self) -> np.ndarray:
        """The checksums of all that was given to `update`; nothing may be added after that."""
        self._flush()
        return np.concatenate([np.empty(0, np.uint64), *self._found])


def write_checksums(directory: Path, fingerprint: str, sums: list[np.ndarray]) -> None:
    """Write checksums.bin of a corpus, from the checksums of its shards in order."""
    file = checksums_file(fingerprint)
    derived.write(directory / CHECKSUMS, file, [one.astype("<u8") for one in sums], shared=False)


def checksums_file(fingerprint: str) -> DerivedFile:
    return DerivedFile(CHECKSUMS, _MAGIC, bytes.fromhex(fingerprint), "checksums of the corpus")


def own_checksums(corpus: Corpus) -> np.ndarray | None:
    """The checksums that the corpus has itself; None for a corpus of an earlier version."""
    file = checksums_file(corpus.fingerprint)
    try:
        return derived.read(corpus.directory / CHECKSUMS, file).view("<u8")
    except FileNotFoundError:
        return None
    except derived.Unusable as error:
        path = corpus.directory / CHECKSUMS
        say(file, f"{path} {error}; the shards are compared with their SHA-256 instead")
        return None
