"""What the main thread of a rank is doing, and since when it has got no further.

A run goes through sections (setup, step, evaluate, save, ...). In a step progress is its end, or
that of a part of it. Elsewhere it is a `mark`, which the long loops of ours leave, or what the
kernel says that the thread reads and writes, or that compilers below it work (procfs.py). The
thread's own processor time is no progress: a thread that spins has it too. Time in which it was
ready to run and got no processor doesn't count.

Guarantees: nothing here waits, locks or needs other ranks, so a loop may mark as often as it likes.
By itself this is what a process without others has in place of a watchdog.

Rejected: one long deadline for all that may be slow (a hang then costs it in full).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from clue_ds.config import HealthSection
from clue_ds.job import diagnosis, procfs

# A step may take several times as long as the slowest one yet.
SLOWER_STEP = 5.0
STACK_DEPTH = 12


class Activity:
    """Where this process' main thread is. `health`: the deadlines of the run."""

    def __init__(self, health: HealthSection) -> None:
        self._signs, self._queued = 0, procfs.seconds_in_the_queue()
        self.begin(health)

    def begin(self, health: HealthSection) -> None:
        """A run begins: it is being set up."""
        self.health = health
        self._step, self._slowest = 0, 0.0
        self._step_began: float | None = None
        self._enter("setup", health.setup_seconds)

    def _enter(self, section: str, limit: float) -> None:
        self._section, self._limit = section, limit
        self.mark()

    def mark(self) -> None:
        """The main thread has got on: deadlines count from now."""
        self._since = self._moved_at = time.monotonic()

    def step(self, step: int) -> bool:
        """`step` steps are done; returns whether all ranks save and stop now (a watchdog knows)."""
        now = time.monotonic()
        if self._step_began is not None:
            self._slowest = max(self._slowest, now - self._step_began)
        self._step, self._step_began = step, now
        self._enter("step", max(self.health.step_seconds, SLOWER_STEP * self._slowest))
        return False

    @contextlib.contextmanager
    def section(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Until the block ends, a busy rank hangs after `seconds` (save_seconds) without a mark."""
        before = self._section, self._limit
        self._enter(name, self.health.save_seconds if seconds is None else seconds)
        yield
        self._enter(*before)
        self._step_began = None  # that step was no measure for others

    def report(self) -> dict[str, Any]:
        """The part of a beat that is about the main thread."""
        stuck, stack = time.monotonic() - self._since, self.stack()
        return {
            "step": self._step,
            "section": self._section,
            "stuck_s": stuck,
            "overdue": stuck > self._limit,
            "idle_s": self._idle(stack),
            "stack": stack,
        }

    def _idle(self, stack: list[str]) -> float:
        """Seconds without any progress; 0 in a step, which has a deadline of its own."""
        if self._section == "step":
            return 0.0
        now, queued = time.monotonic(), procfs.seconds_in_the_queue()
        # Others on a crowded machine are no fault of this thread's.
        self._moved_at = min(now, self._moved_at + queued - self._queued)
        signs = procfs.signs_of_main_thread()
        # What is read and written while it waits for other ranks is theirs.
        if signs != self._signs and not diagnosis.waits(stack):
            self._moved_at = now
        self._signs, self._queued = signs, queued
        return now - self._moved_at

    def stack(self) -> list[str]:
        """Where the main thread is, innermost call last."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        entries = traceback.extract_stack(frame)[-STACK_DEPTH:] if frame else []
        return [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in entries]
