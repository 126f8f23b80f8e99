"""`Loader`: the batches of one rank, made in advance by a prefetch thread.

The stream's compiled calls release the GIL, so one thread is enough to make a batch while the step
before it runs. With a lanes order, a second thread reads the corpus ahead of the first one
(readahead.py). Guarantees: batches come in order from start_step on; an exception in a thread is
raised by `next`; `close` (or leaving the `with` block) ends the threads. The whole state is one
number, and the batches that the run skips: to resume, start at the step after the last one that was
trained on, with the same skips.

Batches for a GPU are in pinned memory: a copy from other memory would make the training loop wait
until the GPU has finished everything that was queued before.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from clue_ds.data.stream.readahead import ReadAhead
from clue_ds.data.stream.sample_stream import SampleStream

if TYPE_CHECKING:
    import torch

Batch = dict[str, "torch.Tensor"]
NUM_PREFETCHED = 4
_POLL_SECONDS = 0.1


class Skip(NamedTuple):
    """From `step` on (from 0), a run uses batches that come `num_batches` later in its stream."""

    step: int
    num_batches: int


def batch_number(step: int, skips: Sequence[Skip]) -> int:
    """The batch of the sample stream on which a run with these skips trains in `step` (from 0)."""
    return step + sum(skip.num_batches for skip in skips if skip.step <= step)


class Loader(Iterator[Batch]):
    """An endless iterator of `stream.batch(number, rank, world_size)` for the batch numbers of
    step = start_step, ...; without skips a batch's number is its step.

    Batches are on the host. `device` is where the caller copies them to: for a GPU they are pinned.
    """

    def __init__(
        self,
        stream: SampleStream,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        device: torch.device | None = None,
        skips: Sequence[Skip] = (),
    ) -> None:
        stream.batch_size(world_size)  # raises for a bad world size here, not in the thread
        self.next_step = start_step
        self._stream = stream
        self._rank, self._world_size, self._skips = rank, world_size, tuple(skips)
        self._gpu = device if device is not None and device.type != "cpu" else None
        self._read_ahead = ReadAhead(stream, rank, world_size) if stream.uses_lanes else None
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(NUM_PREFETCHED)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(start_step,), name="clue-ds-loader", daemon=True
        )
        self._thread.start()

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
        """End the threads; after that, `next` raises StopIteration."""
        self._stop.set()
        self._thread.join()
        if self._read_ahead is not None:
            self._read_ahead.close()

    def _run(self, step: int) -> None:
        try:
            if self._gpu is not None:
                import torch

                # A new thread's device is GPU 0, and pinning memory there would take some of it.
                torch.accelerator.set_device_index(self._gpu)
            while not self._stop.is_set():
                number = batch_number(step, self._skips)
                if self._read_ahead is not None:
                    self._read_ahead.wait(number)
                batch = self._stream.batch(number, self._rank, self._world_size)
                if self._gpu is not None:
                    batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
                self._put(batch)
                step += 1
        except BaseException as error:  # the consumer raises it
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        """Queue the item; return when it is queued or the loader was closed."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return
