"""Which rank of a job is slow, although all ranks take equally long for a step.

Ranks wait for each other in every step, so the step of a healthy rank lasts as long as that of the
slowest. What is compared instead is a rank's own work: the time until its batch has arrived, and
its forward passes, in which no rank waits for another (on a GPU measured by events of the device).
Every STEPS_PER_ROUND steps the ranks exchange the median of theirs in one small all-reduce, and
each is compared with the median of the others.

Guarantees: a rank that becomes twice as slow as the median of the others is named, with its host,
within 50 steps; a pause of a few steps (garbage collection, another process) names nobody, because
a rank must be slow in two rounds one after the other.

At ZeRO stage 3 the ranks wait for each other inside the forward pass too, so only the time until
the batch has arrived is compared there. Rejected: the time of the whole step (it is the same on all
ranks); processor time (a rank whose host gives its cores to other processes uses no more of it);
hooks around every collective.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch

from clue_ds import dist

STEPS_PER_ROUND = 16
# 2 would miss half of the ranks that are twice as slow.
SLOW = 1.6
# A difference below this share of the step is not worth a message.
LEAST_SHARE_OF_STEP = 0.02
STEPS_BETWEEN_MESSAGES = 1_000


class SlowRanks:
    """Measures the own work of this rank, and names the ranks that are slow."""

    def __init__(self, hosts: list[str], device: torch.device, waits_in_forward: bool) -> None:
        """`hosts`: of all ranks, in order; `waits_in_forward`: whether ranks do (ZeRO stage 3)."""
        self._device = device
        self._waits_in_forward = waits_in_forward
        self._hosts = hosts
        self._slowest: tuple[int, float] | None = None
        self._named_at: dict[int, int] = {}
        self._slow_before: set[int] = set()
        self._num_rounds = 0
        self._on_host = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []
        self._start_round()

    def _start_round(self) -> None:
        self._steps: list[tuple[float, list[tuple[torch.Event, torch.Event]]]] = []
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block gets the batch of this rank."""
        began = time.perf_counter()
        yield
        self._on_host += time.perf_counter() - began

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """The block is a forward pass."""
        if self._waits_in_forward:
            yield
        elif self._device.type != "cpu":
            module = torch.get_device_module(self._device)
            begin, end = (module.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            with self.waiting():
                yield

    def step(self, step: int) -> str | None:
        """`step` steps are done: None, or the line for the user; every rank must call it."""
        self._steps.append((self._on_host, self._events))
        self._on_host, self._events = 0.0, []
        if len(self._hosts) == 1 or len(self._steps) < STEPS_PER_ROUND:
            return None
        # The step has read its gradient norm, so the device has passed all events.
        own = statistics.median(
            seconds + sum(begin.elapsed_time(end) for begin, end in events) / 1_000
            for seconds, events in self._steps
        )
        values = [0.0] * (len(self._hosts) + 1)
        values[dist.rank()] = own
        values[-1] = (time.perf_counter() - self._began) / STEPS_PER_ROUND
        *by_rank, whole = dist.all_reduce(values)
        self._start_round()
        return self.judge(step, by_rank, whole / len(self._hosts))

    def figures(self) -> dict[str, float]:
        """Log entries: the slowest rank of the last round, and its time divided by the median."""
        if self._slowest is None:
            return {}
        rank, ratio = self._slowest
        return {"slowest_rank": rank, "slowest_rank_ratio": ratio}

    def judge(self, step: int, by_rank: list[float], step_seconds: float) -> str | None:
        """The line about the round that ended with `step`: each rank's seconds of its own work."""
        self._num_rounds += 1
        ratios = [own / max(median_of_others(by_rank, r), 1e-9) for r, own in enumerate(by_rank)]
        worst = max(range(len(ratios)), key=ratios.__getitem__)
        self._slowest = worst, ratios[worst]
        slow = {
            rank
            for rank, ratio in enumerate(ratios)
            if ratio > SLOW and by_rank[rank] * (1 - 1 / ratio) > LEAST_SHARE_OF_STEP * step_seconds
        }
        # In the first round everything is compiled, allocated and read for the first time.
        again = slow & self._slow_before if self._num_rounds > 1 else set()
        self._slow_before = slow if self._num_rounds > 1 else set()
        new = sorted(
            rank
            for rank in again
            if step - self._named_at.get(rank, -STEPS_BETWEEN_MESSAGES) >= STEPS_BETWEEN_MESSAGES
        )
        if not new:
            return None
        self._named_at.update(dict.fromkeys(new, step))
        named = "; ".join(
            f"rank {rank} on {self._hosts[rank]} needs {1000 * by_rank[rank]:.1f} ms per step for "
            f"its batch and forward pass, {ratios[rank]:.1f} times the median of the other ranks "
            f"({1000 * median_of_others(by_rank, rank):.1f} ms)"
            for rank in new
        )
        return (
            f"warning: slow at step {step}: {named}. All ranks wait for it; look at clocks, "
            "temperature, other processes and the disk of that host"
        )


def median_of_others(by_rank: list[float], rank: int) -> float:
    """Of all but `rank`: with two ranks the median of all could not be half of the slower one."""
    return statistics.median(by_rank[:rank] + by_rank[rank + 1 :])
