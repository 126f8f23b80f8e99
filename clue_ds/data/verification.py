"""Finds damage in a corpus before a batch is made of it: `Checks`, and a pass over everything.

A corpus has a checksum of each piece of 32 KiB of its shards, in checksums.bin (checksums.py).
`Checks` compares a piece with it before this process uses it for the first time: those of a corpus
of up to AT_OPEN_BYTES when it is opened, those of a larger one when a batch needs them, and with a
lanes order whenever the read-ahead reads them from the disk. A corpus of an earlier version has no
such file: its shards are read once and compared with their SHA-256, and of a corpus larger than
AT_OPEN_BYTES the checksums are kept for later starts (derived.py).

Guarantees: a damaged piece is a UserError that names the file and the bytes, before a batch is made
of it. Pieces are read with pread, so a file that was cut off and a disk error are messages too;
through a map they would kill the process. What has been compared stays in the page cache, and is
not compared again unless it is read again.

Rejected: a stamp with sizes and times of files (a bit that flips on a disk or in memory changes
none of them); reading all of a large corpus at each start.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clue_ds.data.checksums import (
    PIECE_BYTES,
    PieceChecksums,
    checksums,
    checksums_file,
    num_pieces,
    own_checksums,
)
from clue_ds.data.corpus import CHECKSUMS, HEADER_BYTES, Corpus, ShardFile, continues_bit
from clue_ds.data.derived import open_derived, say
from clue_ds.errors import UserError

# So much is read and compared in some 0.1 s, the time in which numba is imported.
AT_OPEN_BYTES = 1 << 28
READ_BYTES = 1 << 20
MAX_THREADS = 8
_SECONDS_A_LINE = 10.0
_COPY_AGAIN = (
    "copy the corpus again, or make it again with `clue-ds shard`; `clue-ds shard --verify "
    "--output {}` lists all files that are damaged"
)


# ------------------------------------------------------------------------------- a pass over it all


def verify(corpus: Corpus) -> np.ndarray:
    """Read all shards; return their checksums. A UserError names all files that are damaged.

    Compares every SHA-256, and checks that ids are of the vocabulary and that sentence and document
    ends increase up to the numbers of tokens and sentences.
    """
    found, bad, stopped = [], [], threading.Event()
    num_bytes, last_line = 0, time.monotonic()
    pool = ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))))
    try:
        shards = range(len(corpus.files))
        for shard, result in enumerate(pool.map(lambda i: _shard(corpus, i, stopped), shards)):
            if isinstance(result, str):
                bad.append(f"{corpus.records[shard].file} {result}")
            else:
                found.append(result)
            num_bytes += corpus.records[shard].num_bytes
            if time.monotonic() - last_line > _SECONDS_A_LINE:
                last_line = time.monotonic()
                done = f"{num_bytes / 1e9:,.1f} of {corpus.num_bytes / 1e9:,.1f} GB"
                say(checksums_file(corpus.fingerprint), f"compared {done} with their SHA-256")
    finally:
        stopped.set()  # Ctrl-C
        pool.shutdown(cancel_futures=True)
    if bad:
        raise UserError(
            f"corpus {corpus.directory} is damaged: {'; '.join(bad)}; copy it again or run "
            "`clue-ds shard` again with --force"
        )
    return np.concatenate(found)


def verify_with_own_checksums(corpus: Corpus) -> None:
    """`verify`, and compare checksums.bin where there is one."""
    found, own = verify(corpus), own_checksums(corpus)
    path = corpus.directory / CHECKSUMS
    if path.exists() and (own is None or not np.array_equal(found, own)):
        raise UserError(f"{path} is damaged, and the shards are not; delete it, or copy it again")


def _shard(corpus: Corpus, shard: int, stopped: threading.Event) -> np.ndarray | str:
    """The checksums of a shard, or what is wrong with it."""
    file, record = corpus.files[shard], corpus.records[shard]
    digest, sums = hashlib.sha256(), PieceChecksums()
    largest = _largest_id(file)
    with open(file.path, "rb", buffering=0) as opened:
        while (block := opened.read(READ_BYTES)) and not stopped.is_set():
            digest.update(block)
            if len(block) % 4:
                break  # not all of it: the hash will differ
            sums.update(block)
    if digest.hexdigest() != record.sha256:
        return "changed since it was written"
    if largest >= corpus.vocab_size:
        return f"has the id {largest}, and the vocabulary has {corpus.vocab_size} tokens"
    sentences, documents = file.read_tables()
    for name, ends, num in (
        ("sentence", sentences, record.num_tokens),
        ("document", documents, record.num_sentences),
    ):
        if not len(ends) or ends[0] == 0 or ends[-1] != num or (ends[1:] <= ends[:-1]).any():
            return f"has {name} ends that don't increase up to {num:,}"
    return sums.result()


def _largest_id(file: ShardFile) -> int:
    """The largest id of a shard's tokens, read from the file."""
    tokens = file.arrays.tokens
    mask = tokens.dtype.type(continues_bit(tokens.dtype.type) - 1)
    largest = 0
    with open(file.path, "rb", buffering=0) as opened:
        opened.seek(HEADER_BYTES)
        left = tokens.nbytes
        while left and (block := opened.read(min(left, READ_BYTES))):
            left -= len(block)
            whole = len(block) // tokens.itemsize * tokens.itemsize
            largest = max(largest, int((np.frombuffer(block[:whole], tokens.dtype) & mask).max()))
    return largest


# ---------------------------------------------------------------------------------------- first use


class Checks:
    """The checksums of some corpora's shards, and which pieces this process has compared.

    Pieces are numbered through all shards. Several threads may use it at once. All methods raise a
    UserError that names the file and its bytes where something differs.
    """

    def __init__(self, corpora: Iterable[Corpus]) -> None:
        corpora = list(corpora)
        self.files = [file for one in corpora for file in one.files]
        records = [record for one in corpora for record in one.records]
        self._sizes = [record.num_bytes for record in records]
        self.first_pieces = np.cumsum([0, *map(num_pieces, self._sizes)]).astype(np.int64)
        self._num_left = int(self.first_pieces[-1])
        self.is_compared = np.zeros(self._num_left, np.uint8)
        self.has_tables_compared = np.zeros(len(self.files), np.uint8)
        self._lock = threading.Lock()
        self._numbers = {file.path: shard for shard, file in enumerate(self.files)}
        first_of_each = np.cumsum([0, *(len(one.files) for one in corpora)]).tolist()[:-1]
        tables = []
        for one, begin in zip(corpora, first_of_each, strict=True):
            table, is_compared = _checksums_of(one)
            first, end = self.first_pieces[[begin, begin + len(one.files)]].tolist()
            assert len(table) == end - first, "its fingerprint is that of the corpus"
            tables.append(table)
            if is_compared:
                self._mark(first, end)
        self._expected = tables[0] if len(tables) == 1 else np.concatenate(tables)
        for one, begin in zip(corpora, first_of_each, strict=True):
            if one.num_bytes <= AT_OPEN_BYTES:
                self.compare_pieces(np.arange(*self.first_pieces[[begin, begin + len(one.files)]]))

    @property
    def is_complete(self) -> bool:
        """Whether all pieces have been compared."""
        return self._num_left == 0

    def compare_tables(self, file: ShardFile) -> None:
        """Compare sentence and document ends of a shard, unless that is done."""
        shard = self._numbers[file.path]
        if not self.has_tables_compared[shard]:
            tables = (file.first_token + file.arrays.tokens.nbytes) // PIECE_BYTES
            first, end = self.first_pieces[shard : shard + 2].tolist()
            self.compare_pieces(np.arange(first + tables, end))
            self.has_tables_compared[shard] = 1

    def compare_pieces(self, pieces: np.ndarray) -> None:
        """Read those of the pieces, int64, that have not been compared, and compare them."""
        pieces = np.unique(pieces[self.is_compared[pieces] == 0])
        shards = np.searchsorted(self.first_pieces, pieces, side="right") - 1
        # Pieces that follow each other in one shard are read together, up to READ_BYTES.
        breaks = np.flatnonzero((np.diff(pieces) != 1) | (np.diff(shards) != 0)) + 1
        for run in np.split(np.arange(len(pieces)), breaks):
            for at in range(0, len(run), READ_BYTES // PIECE_BYTES):
                part = run[at : at + READ_BYTES // PIECE_BYTES]
                shard = int(shards[part[0]])
                first = int(pieces[part[0]] - self.first_pieces[shard])
                self._read(shard, first, first + len(part))

    def _read(self, shard: int, first: int, end: int) -> None:
        """Read and compare pieces first .. end - 1 of a shard, counted from its start."""
        offset = first * PIECE_BYTES
        data = np.empty(min(end * PIECE_BYTES, self._sizes[shard]) - offset, np.uint8)
        path = self.files[shard].path
        with open_shard(path) as descriptor:
            read_exactly(descriptor, path, data.data, offset)
        self.compare(shard, offset, data)

    def compare(self, shard: int, offset: int, data: np.ndarray) -> None:
        """Compare the pieces that lie wholly in `data`, uint8: a shard's bytes from `offset` on."""
        begin = -(-offset // PIECE_BYTES)
        end = (offset + len(data)) // PIECE_BYTES
        if offset + len(data) == self._sizes[shard]:
            end = num_pieces(self._sizes[shard])
        if begin >= end:
            return
        whole = data[begin * PIECE_BYTES - offset : end * PIECE_BYTES - offset]
        first = int(self.first_pieces[shard])
        differ = checksums(whole) != self._expected[first + begin : first + end]
        if differ.any():
            piece = begin + int(differ.argmax())
            path = self.files[shard].path
            last = min((piece + 1) * PIECE_BYTES, self._sizes[shard])
            raise UserError(
                f"{path} is damaged between bytes {piece * PIECE_BYTES:,} and {last:,}: they are "
                f"not what was written; {_COPY_AGAIN.format(path.parent)}"
            )
        self._mark(first + begin, first + end)

    def _mark(self, first: int, end: int) -> None:
        with self._lock:
            self._num_left -= int((self.is_compared[first:end] == 0).sum())
            self.is_compared[first:end] = 1

    def widen(self, shard: int, begin: int, end: int) -> tuple[int, int]:
        """Bytes of a shard, begun or ended earlier or later by a piece that isn't compared yet."""
        first = int(self.first_pieces[shard])
        if not self.is_compared[first + begin // PIECE_BYTES]:
            begin = begin // PIECE_BYTES * PIECE_BYTES
        if not self.is_compared[first + (end - 1) // PIECE_BYTES]:
            end = min(-(-end // PIECE_BYTES) * PIECE_BYTES, self._sizes[shard])
        return begin, end


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[int]:
    """A descriptor of a shard's file, closed at the end of the `with` block."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise UserError(f"{path} was removed while in use; copy the corpus again") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, path: Path, into: memoryview, offset: int) -> None:
    """Fill `into` with the bytes from `offset` on of an open shard."""
    done = 0
    while done < len(into):
        try:
            num = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise UserError(
                f"{path} can't be read after byte {offset + done:,} ({error.strerror}); check its "
                "disk, or copy the corpus again"
            ) from None
        if num == 0:
            raise UserError(
                f"{path} ends at byte {offset + done:,}; it was cut off while in use. Copy the "
                "corpus again"
            )
        done += num


def _checksums_of(corpus: Corpus) -> tuple[np.ndarray, bool]:
    """The checksums of a corpus's shards, and whether all shards have just been compared."""
    own = own_checksums(corpus)
    if own is not None:
        return own, False
    if corpus.num_bytes <= AT_OPEN_BYTES:
        return verify(corpus), True
    file = checksums_file(corpus.fingerprint)

    def make(path: Path | None) -> list[np.ndarray]:
        later = "" if path is None else f"; later starts read {path}"
        say(
            file,
            f"comparing the {corpus.num_bytes / 1e9:,.1f} GB of {corpus.directory} with their "
            f"SHA-256{later}",
        )
        return [verify(corpus).astype("<u8")]

    return open_derived(corpus, file, make).view("<u8"), False
