"""`Loader`: the batches of one rank, made ahead by one background thread.

The stream's compiled calls release the GIL, so one thread is enough to hide a batch behind the step
before it. Where the order is one of lanes, a second thread reads the corpus ahead of the first
(readahead.py). Guarantees: batches come in order from start_step on; what goes wrong in a thread
is raised by `next`; `close` (or leaving the `with` block) ends the threads. The whole state is one
number: to resume, start at the step after the last one that was trained on.

Batches for a GPU lie in pinned memory: a copy from other memory would keep the training loop
waiting until the GPU has done all that it was given before.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from clue_ds.data.stream.readahead import ReadAhead
from clue_ds.data.stream.sample_stream import SampleStream

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
NUM_PREFETCHED = 4
_POLL_SECONDS = 0.1


class Loader(Iterator[Batch]):
    """An endless iterator of `stream.batch(step, rank, world_size)` for step = start_step, ...

    `device`: where the batches go from here; they are on the host.
    """

    def __init__(
        self,
        stream: SampleStream,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        device: torch.device | None = None,
    ) -> None:
        stream.batch_size(world_size)  # a bad world size is the caller's error, not the thread's
        self.next_step = start_step
        self._stream = stream
        self._rank, self._world_size = rank, world_size
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._read_ahead = ReadAhead(stream, rank, world_size) if stream.uses_lanes else None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(NUM_PREFETCHED)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(start_step,), name="clue-ds-loader", daemon=True
        )
        self._thread.start()

    @property
    def samples_consumed(self) -> int:
        """Samples of all ranks in the batches handed out so far, and before start_step."""
        return self.next_step * self._stream.global_batch_size

    def __next__(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.next_step += 1
        return item

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; the iterator is then at its end."""
        self._stop.set()
        self._thread.join()
        if self._read_ahead is not None:
            self._read_ahead.close()

    def _run(self, step: int) -> None:
        try:
            if self._gpu is not None:
                import torch

                # A thread begins on GPU 0, and pinning there would take memory of it.
                torch.cuda.set_device(self._gpu)
            while not self._stop.is_set():
                if self._read_ahead is not None:
                    self._read_ahead.wait(step)
                batch = self._stream.batch(step, self._rank, self._world_size)
                if self._gpu is not None:
                    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
                self._put(batch)
                step += 1
        except BaseException as error:  # the consumer raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        """Return when the item was taken, or the loader closed."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return
