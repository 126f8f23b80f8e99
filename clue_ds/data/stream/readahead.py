"""`ReadAhead`: brings the blocks of a lanes order into memory before the batches need them.

The order is a pure function, so its future is known: for each lane of a rank, the window at hand
and, soon before its end, the next one. One thread reads these blocks by pread into one scratch
buffer, which leaves them in the page cache, where the mapped shards find them; `wait` returns when
all that a step needs is there, and the pages of windows that were left are unmapped. So the disk
sees blocks of 1 MiB, a read error is an OSError that names its file (through the map it would kill
the process), and a rank's memory stays at its lanes' windows, whatever the size of the corpus.

All this is advice: batches are the same without it, only slower. Rejected: reading into buffers of
our own (every kind of sample would need a second way to its tokens, and ranks of one node could
not share what they read), MADV_WILLNEED (returns before the data is there, fails in silence, and
many network file systems ignore it).
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clue_ds.data.stream.labelled_pairs import LabelledPairs
from clue_ds.data.stream.order import BLOCK_BYTES, line_samples, windows_at
from clue_ds.data.stream.sample_stream import SampleStream

_MAPPED_AT_ONCE = 1 << 16  # bytes that Linux maps around a touched page


class _Piece(NamedTuple):
    """A run of bytes of one shard's file."""

    shard: int
    begin: int
    end: int


class _Window:
    """What a lane reads in one window, and whether it has been read."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self.pieces = pieces
        self.is_read = threading.Event()


_Key = tuple[int, int, int, int]  # part, epoch, begin and end on the epoch's line


class ReadAhead:
    """Reads ahead for the rows that rank `rank` takes of every batch of a lanes stream.

    `bytes_read` counts what the thread has read. `wait` raises what went wrong in the thread.
    """

    def __init__(self, stream: SampleStream, rank: int, world_size: int) -> None:
        assert stream.uses_lanes and not isinstance(stream.corpus, LabelledPairs)
        self._stream, self._files = stream, stream.corpus.files
        table = stream.order
        size = stream.batch_size(world_size)
        rows_per_lane = table.global_batch_size // table.num_lanes
        first, last = rank * size, (rank + 1) * size - 1
        self._first_lane = first // rows_per_lane
        self._num_lanes = last // rows_per_lane + 1 - self._first_lane
        self._at = np.empty(0, dtype=np.int64)  # what windows_at said last
        self._needed: list[_Window] = []
        self._windows: dict[_Key, _Window] = {}
        self._queue: queue.SimpleQueue[_Window | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = False
        self.bytes_read = 0
        self._thread = threading.Thread(target=self._run, name="clue-ds-readahead", daemon=True)
        self._thread.start()

    def wait(self, step: int) -> None:
        """Return when all that the rank's rows of `step` need is in memory."""
        table = self._stream.order
        # A lane asks for its next window when one block of the one at hand is left.
        at = windows_at(step, self._first_lane, self._num_lanes, table.block, table)
        if not np.array_equal(at, self._at):
            self._advance(at)
        for window in self._needed:
            window.is_read.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread and unmap what it had brought."""
        self._stopped = True
        self._queue.put(None)
        self._thread.join()
        for window in self._windows.values():
            self._unmap(window)
        self._windows.clear()

    def _advance(self, at: np.ndarray) -> None:
        """Ask for the windows that are new, first those needed at once; let go of old ones."""
        needed, soon = at[:, :, :2].reshape(-1, 4), at[:, :, 2].reshape(-1, 4)
        keys = dict.fromkeys(map(tuple, np.concatenate([needed, soon]).tolist()))
        for key in list(self._windows.keys() - keys.keys()):
            self._unmap(self._windows.pop(key))
        for key in keys:
            if key not in self._windows:
                runs = line_samples(*key, self._stream.order).tolist()
                window = _Window([piece for run in runs for piece in self._pieces(*run)])
                self._windows[key] = window
                self._queue.put(window)
        self._needed = [self._windows[key] for key in set(map(tuple, needed.tolist()))]
        self._at = at

    def _pieces(self, first_sample: int, end_sample: int) -> Iterator[_Piece]:
        for shard, begin, end in self._stream.token_runs(first_sample, end_sample):
            file = self._files[shard]
            item = file.arrays.tokens.itemsize
            yield _Piece(shard, file.first_token + begin * item, file.first_token + end * item)

    def _unmap(self, window: _Window) -> None:
        """Give back the pages of the window's blocks, and those that the kernel mapped around them.

        A neighbour's pages that go with them are in the page cache and come back when touched.
        """
        for piece in window.pieces:
            file = self._files[piece.shard]
            begin = piece.begin // _MAPPED_AT_ONCE * _MAPPED_AT_ONCE
            end = -(-piece.end // _MAPPED_AT_ONCE) * _MAPPED_AT_ONCE
            file.data.madvise(mmap.MADV_DONTNEED, begin, min(end, len(file.data)) - begin)
            # Tables as well, which grow with the corpus; a kernel may map 2 MB for one touch.
            tables = (file.first_token + file.arrays.tokens.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            file.data.madvise(mmap.MADV_DONTNEED, tables)

    def _run(self) -> None:
        scratch = memoryview(bytearray(BLOCK_BYTES))
        while not self._stopped and (window := self._queue.get()) is not None:
            try:
                if self._error is None:
                    for piece in window.pieces:
                        self._read(piece, scratch)
            except BaseException as error:  # `wait` raises it
                self._error = error
            window.is_read.set()

    def _read(self, piece: _Piece, scratch: memoryview) -> None:
        path = self._files[piece.shard].path
        file = os.open(path, os.O_RDONLY)
        try:
            offset = piece.begin
            while offset < piece.end:
                num = os.preadv(file, [scratch[: piece.end - offset]], offset)
                if num == 0:
                    raise OSError(f"{path} ends at byte {offset:,}; it was cut off while in use")
                offset += num
                self.bytes_read += num
        finally:
            os.close(file)
