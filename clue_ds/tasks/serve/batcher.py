"""Dynamic batching: requests that arrive at about the same time are computed in one batch.

One thread owns the model. It takes the waiting requests, up to `max_batch` texts, waits at most
`max_wait_s` for more, computes one batch for each kind of request, and gives every request its own
results.

Guarantees: every request that `submit` accepts gets a result or an exception, also when the batcher
is closed; a request that does not fit is refused at once (Full), before any work; results are in
the request's order; a request that its client has cancelled is not computed.

Rejected: asyncio queues (the model would share a thread with the sockets, or need locks) and a pool
of threads (torch already uses all cores inside an operation; two forward passes at a time would
only compete for the caches).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

# (kind, all texts of that kind) -> a result for each text, in order.
Compute = Callable[[Hashable, list[Any]], Sequence[Any]]


class Full(RuntimeError):
    """The queue holds as many texts as it may; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The batcher accepts no more requests."""


class _Request(NamedTuple):
    kind: Hashable
    items: list[Any]
    future: Future[list[Any]]


@dataclass
class Counters:
    """What the batcher has done so far."""

    num_requests: int = 0
    num_items: int = 0
    num_batches: int = 0
    num_refused: int = 0
    busy_s: float = 0.0


class Batcher:
    """Computes submitted requests on its own thread, until `close`."""

    def __init__(
        self,
        compute: Compute,
        max_batch: int = 32,
        max_wait_s: float = 0.002,
        max_waiting: int = 1024,
    ) -> None:
        self.max_batch = max_batch
        self.max_wait_s = max_wait_s
        self.max_waiting = max_waiting  # texts
        self.counters = Counters()
        self._compute = compute
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of texts that were accepted and are not yet answered."""
        return self._num_waiting

    def submit(self, kind: Hashable, items: list[Any]) -> Future[list[Any]]:
        """A future with the results for `items`; raises Full or Closed if they are refused.

        Requests of equal `kind` are computed together. A request is never split: one with more
        than `max_batch` items is computed alone.
        """
        future: Future[list[Any]] = Future()
        with self._lock:
            if self._is_closed:
                raise Closed("the server is shutting down")
            if self._num_waiting and self._num_waiting + len(items) > self.max_waiting:
                self.counters.num_refused += 1
                raise Full(self._seconds_to_drain())
            self._num_waiting += len(items)
            self.counters.num_requests += 1
            # Inside the lock, so that no request can follow the end marker (None) of `close`.
            self._queue.put(_Request(kind, items, future))
        return future

    def close(self) -> None:
        """Answer every accepted request, then end the thread."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._queue.put(None)
        self._thread.join()

    def _seconds_to_drain(self) -> int:
        done = self.counters
        rate = done.num_items / done.busy_s if done.busy_s > 0 else float(self.max_waiting)
        return max(1, min(60, round(self._num_waiting / rate)))

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            requests, is_last = self._gather(first)
            by_kind: defaultdict[Hashable, list[_Request]] = defaultdict(list)
            for request in requests:
                if request.future.set_running_or_notify_cancel():
                    by_kind[request.kind].append(request)
            for kind, group in by_kind.items():
                self._answer(kind, group)
            with self._lock:
                self._num_waiting -= sum(len(request.items) for request in requests)
            if is_last:
                return

    def _gather(self, first: _Request) -> tuple[list[_Request], bool]:
        """(`first` and the requests that arrive in time, whether the end marker was among them)."""
        requests, num_items = [first], len(first.items)
        deadline = time.monotonic() + self.max_wait_s
        while num_items < self.max_batch:
            try:
                request = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if request is None:
                return requests, True
            requests.append(request)
            num_items += len(request.items)
        return requests, False

    def _answer(self, kind: Hashable, group: list[_Request]) -> None:
        items = [item for request in group for item in request.items]
        begin = time.perf_counter()
        try:
            results = list(self._compute(kind, items))
            assert len(results) == len(items), f"{len(results)} results for {len(items)} items"
        except BaseException as error:  # of any kind: the clients wait for an answer
            for request in group:
                request.future.set_exception(error)
            return
        finally:
            self.counters.busy_s += time.perf_counter() - begin
            self.counters.num_items += len(items)
            self.counters.num_batches += 1
        begin_item = 0
        for request in group:
            end_item = begin_item + len(request.items)
            request.future.set_result(results[begin_item:end_item])
            begin_item = end_item
