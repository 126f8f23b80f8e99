"""A queue in front of a model: requests that arrive together are computed together.

One thread owns the model. It takes what is waiting, up to `max_batch` texts, waits at most
`max_wait_s` for more, computes each kind of work in one go, and hands every request its own part.

Guarantees: what `submit` took is answered, with a result or an exception, also when the batcher is
closed; what it can't take it refuses at once (Full), before any work; results are in the request's
order; a request whose client has cancelled is not computed.

Rejected: asyncio queues (the model would share a thread with the sockets, or need locks), a pool of
threads (torch parallelises inside an operation; two forward passes at once only share the caches).
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

# All texts of one kind of work -> a result for each, in order.
Compute = Callable[[Hashable, list[Any]], Sequence[Any]]


class Full(RuntimeError):
    """As many texts wait as may; try again in `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Closed(RuntimeError):
    """The batcher takes nothing any more."""


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
    """Computes what is submitted, on a thread of its own, until `close`."""

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
        """Texts that were taken and not yet answered."""
        return self._num_waiting

    def submit(self, kind: Hashable, items: list[Any]) -> Future[list[Any]]:
        """Results for `items`, later; Full or Closed at once when they can't be taken.

        Requests of equal `kind` are computed together. One request is never split; it may hold more
        than `max_batch` items, and is then computed alone.
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
            # Inside the lock, so that nothing comes after the end mark of `close`.
            self._queue.put(_Request(kind, items, future))
        return future

    def close(self) -> None:
        """Answer everything that was taken, then end the thread."""
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
        """`first` and what else is there or comes in time; whether the end mark was among it."""
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
        except BaseException as error:  # whatever it is, somebody waits for it
            for request in group:
                request.future.set_exception(error)
            return
        finally:
            self.counters.busy_s += time.perf_counter() - begin
            self.counters.num_items += len(items)
            self.counters.num_batches += 1
        place = 0
        for request in group:
            request.future.set_result(results[place : place + len(request.items)])
            place += len(request.items)
