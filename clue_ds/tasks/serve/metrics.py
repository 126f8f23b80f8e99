"""GET /metrics: what the service has done, in Prometheus' text format.

Guarantees: a client can't make names up, because paths that don't exist are counted under one; the
registry is the app's own, so that several apps in one process count apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from clue_ds.tasks.serve.app import Queue

OTHER = "other"  # paths that don't exist
# Upper bounds in seconds: from a cache's answer to a long queue's.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counts answers and measures their time; `text` adds what the queue has done.

    `paths`: those of the API, once it is complete.
    """

    def __init__(self, waiting: Queue) -> None:
        self.paths: frozenset[str] = frozenset()
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "clue_ds_responses", "Answers.", ["path", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "clue_ds_request_seconds",
            "From a request's headers to the end of its answer.",
            ["path"],
            registry=self._registry,
            buckets=BUCKETS,
        )
        self._registry.register(_OfQueue(waiting))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        known = path if path in self.paths else OTHER
        self._responses.labels(known, status).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _OfQueue(Collector):
    """The figures of the queue at the moment at which they are asked for."""

    def __init__(self, waiting: Queue) -> None:
        self._waiting = waiting

    def collect(self) -> Iterable[Metric]:
        done = self._waiting.counters
        for name, what, value in (
            ("requests_computed", "Requests that the model has answered.", done.num_requests),
            ("requests_refused", "Requests refused because the queue was full.", done.num_refused),
            ("texts", "Texts that the model has read.", done.num_items),
            ("batches", "Batches that the model has computed.", done.num_batches),
            ("model_seconds", "Seconds in which the model was computing.", done.busy_s),
        ):
            yield CounterMetricFamily(f"clue_ds_{name}", what, value=value)
        yield GaugeMetricFamily(
            "clue_ds_texts_waiting", "Texts in the queue.", value=self._waiting.num_waiting
        )
