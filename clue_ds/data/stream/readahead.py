"""`ReadAhead`: reads the blocks of a lanes order into memory before the batches need them.

The order is a pure function, so the blocks that come next are known: for each lane of a rank, its
current window and, shortly before that ends, the next one. One thread reads these blocks with pread
into one scratch buffer, which leaves them in the page cache, where the mapped shards find them.
`wait` returns when everything that a step needs has been read, and the pages of windows that are
done are unmapped. So the disk sees reads of 1 MiB, a read error is a UserError that names its file
(through the map it would kill the process), what was read is compared with its checksums, and the
memory that a rank maps is that of its lanes' windows, however large the corpus is.

Batches are the same without all this, only slower. Rejected: reading into buffers of our own (every
kind of samples would need a second way to its tokens, and ranks of one host could not share what
they read); MADV_WILLNEED (it returns before the data has been read, doesn't report errors, and is
ignored by many network file systems).
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clue_ds.data.stream.labelled_pairs import LabelledPairs
from clue_ds.data.stream.order import BLOCK_BYTES, line_samples, windows_at
from clue_ds.data.stream.sample_stream import SampleStream
from clue_ds.data.verification import open_shard, read_exactly

_MAPPED_AT_ONCE = 1 << 16  # bytes that Linux maps around a touched page


class _ByteRange(NamedTuple):
    """A run of bytes of one shard's file."""

    shard: int
    begin: int
    end: int


class _Window:
    """The bytes of one window of a lane, and whether they have been read."""

    def __init__(self, ranges: list[_ByteRange]) -> None:
        self.ranges = ranges
        self.is_read = threading.Event()


_Key = tuple[int, int, int, int]  # corpus, epoch, begin and end on the epoch's line


class ReadAhead:
    """Reads ahead for the rows that rank `rank` takes of every batch of a stream with lanes.

    `bytes_read` is the number of bytes that the thread has read. `wait` raises the exception that
    ended the reading, if there was one.
    """

    def __init__(self, stream: SampleStream, rank: int, world_size: int) -> None:
        assert stream.uses_lanes and not isinstance(stream.corpus, LabelledPairs)
        self._stream, self._files = stream, stream.corpus.files
        self._checks = stream.checks
        table = stream.order
        size = stream.batch_size(world_size)
        rows_per_lane = table.global_batch_size // table.num_lanes
        first, last = rank * size, (rank + 1) * size - 1
        self._first_lane = first // rows_per_lane
        self._num_lanes = last // rows_per_lane + 1 - self._first_lane
        self._at = np.empty(0, dtype=np.int64)  # the last result of windows_at
        self._needed: list[_Window] = []
        self._windows: dict[_Key, _Window] = {}
        self._queue: queue.SimpleQueue[_Window | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = False
        self.bytes_read = 0
        self._thread = threading.Thread(target=self._run, name="clue-ds-readahead", daemon=True)
        self._thread.start()

    def wait(self, step: int) -> None:
        """Return when everything that the rank's rows of `step` need has been read."""
        table = self._stream.order
        # A lane asks for its next window when one block of the current one is left.
        at = windows_at(step, self._first_lane, self._num_lanes, table.block, table)
        if not np.array_equal(at, self._at):
            self._advance(at)
        for window in self._needed:
            window.is_read.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread and unmap what it has read."""
        self._stopped = True
        self._queue.put(None)
        self._thread.join()
        for window in self._windows.values():
            self._unmap(window)
        self._windows.clear()

    def _advance(self, at: np.ndarray) -> None:
        """Queue the windows that are new, those needed at once first, and unmap the old ones."""
        needed, soon = at[:, :, :2].reshape(-1, 4), at[:, :, 2].reshape(-1, 4)
        keys = dict.fromkeys(map(tuple, np.concatenate([needed, soon]).tolist()))
        for key in list(self._windows.keys() - keys.keys()):
            self._unmap(self._windows.pop(key))
        for key in keys:
            if key not in self._windows:
                runs = line_samples(*key, self._stream.order).tolist()
                window = _Window([one for run in runs for one in self._byte_ranges(*run)])
                self._windows[key] = window
                self._queue.put(window)
        self._needed = [self._windows[key] for key in set(map(tuple, needed.tolist()))]
        self._at = at

    def _byte_ranges(self, first_sample: int, end_sample: int) -> Iterator[_ByteRange]:
        for shard, begin, end in self._stream.token_runs(first_sample, end_sample):
            file = self._files[shard]
            item = file.arrays.tokens.itemsize
            yield _ByteRange(shard, file.first_token + begin * item, file.first_token + end * item)

    def _unmap(self, window: _Window) -> None:
        """Unmap the pages of the window's blocks, and those that the kernel mapped around them.

        Pages of another window that are unmapped with them are still in the page cache, and are
        mapped again when they are touched.
        """
        for one in window.ranges:
            file = self._files[one.shard]
            begin = one.begin // _MAPPED_AT_ONCE * _MAPPED_AT_ONCE
            end = -(-one.end // _MAPPED_AT_ONCE) * _MAPPED_AT_ONCE
            file.data.madvise(mmap.MADV_DONTNEED, begin, min(end, len(file.data)) - begin)
            # Sentence and document ends as well: they grow with the corpus, and a kernel may map
            # 2 MB around the page that is touched.
            tables = (file.first_token + file.arrays.tokens.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            file.data.madvise(mmap.MADV_DONTNEED, tables)

    def _run(self) -> None:
        scratch = np.empty(BLOCK_BYTES, np.uint8)
        while not self._stopped and (window := self._queue.get()) is not None:
            try:
                if self._error is None:
                    for one in window.ranges:
                        self._read(one, scratch)
            except BaseException as error:  # `wait` raises it
                self._error = error
            window.is_read.set()

    def _read(self, byte_range: _ByteRange, scratch: np.ndarray) -> None:
        """Read the bytes, and compare all pieces that lie in them."""
        path, checks = self._files[byte_range.shard].path, self._checks
        offset, last = checks.widen(*byte_range)
        with open_shard(path) as descriptor:
            while offset < last:
                # Up to a multiple of BLOCK_BYTES, so that no piece lies across two reads, and at
                # its own place in the buffer, so that the words of a piece are aligned.
                begin = offset % BLOCK_BYTES
                data = scratch[begin : min(BLOCK_BYTES, begin + last - offset)]
                read_exactly(descriptor, path, data.data, offset)
                checks.compare(byte_range.shard, offset, data)
                offset += len(data)
                self.bytes_read += len(data)
