"""What the main thread of a rank is doing, and for how long it has made no progress.

A run goes through sections (setup, step, evaluate, save, ...). In the section "step", progress is
the end of a step or of a micro-batch. In the other sections it is a call of `mark`, which our long
loops make, or, according to the kernel, bytes that the thread reads or writes and work of compilers
in child processes (procfs.py). Processor time of the thread itself is not progress, because an
infinite loop uses it too. Time in which the thread was ready to run but got no processor does not
count against it. While the main thread waits for another thread (a save in the background), what
that one reads and writes is progress instead.

Guarantees: nothing here waits, locks or needs other ranks, so a loop may call `mark` as often as it
likes. A process without a watchdog uses this class directly.

Rejected: one long deadline for everything that may be slow (a hang would then take all of it).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from clue_ds.job import diagnosis, procfs
from clue_ds.settings.sections import HealthSection

# A step may take this many times as long as the slowest one so far.
SLOWER_STEP = 5.0
STACK_DEPTH = 12


class Activity:
    """What the main thread is doing. `health`: the deadlines of the run."""

    def __init__(self, health: HealthSection) -> None:
        self._waits_for: threading.Thread | None = None
        self._signs, self._queued = 0, procfs.seconds_in_the_queue()
        self.begin(health)

    def begin(self, health: HealthSection) -> None:
        """A run begins with its setup."""
        self.health = health
        self._step, self._slowest = 0, 0.0
        self._step_began: float | None = None
        self._enter("setup", health.setup_seconds)

    def _enter(self, section: str, limit: float) -> None:
        self._section, self._limit = section, limit
        self.mark()

    def mark(self) -> None:
        """Record progress of the main thread: deadlines count from now."""
        self._since = self._moved_at = time.monotonic()

    @contextlib.contextmanager
    def waiting_for(self, thread: threading.Thread) -> Iterator[None]:
        """In the block, what `thread` reads or writes is progress, and its stack is reported.

        Unlike `mark`, that does not begin the deadline of the section again.
        """
        self._waits_for = thread
        try:
            yield
        finally:
            self._waits_for = None

    def begin_phase(self) -> None:
        """The next step may take much longer than those before it, as the first one of a run."""
        self._step_began = time.monotonic()
        self._enter("setup", self.health.setup_seconds)

    def step(self, step: int) -> bool:
        """`step` steps are done; True when all ranks are to save and stop (see Watchdog.step)."""
        now = time.monotonic()
        if self._step_began is not None:
            self._slowest = max(self._slowest, now - self._step_began)
        self._step, self._step_began = step, now
        self._enter("step", max(self.health.step_seconds, SLOWER_STEP * self._slowest))
        return False

    @contextlib.contextmanager
    def section(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """In the block even a busy rank hangs after `seconds` (save_seconds) without a mark."""
        before = self._section, self._limit
        self._enter(name, self.health.save_seconds if seconds is None else seconds)
        yield
        self._enter(*before)
        self._step_began = None  # this step is not compared with others

    def report(self) -> dict[str, Any]:
        """What a heartbeat says about the main thread."""
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
        """Seconds without any progress; 0 in a step, which has its own deadline."""
        if self._section == "step":
            return 0.0
        now, queued = time.monotonic(), procfs.seconds_in_the_queue()
        # Time in which other processes of a busy machine had the processor is not counted.
        self._moved_at = min(now, self._moved_at + queued - self._queued)
        thread = self._waits_for
        if thread is None:
            signs = procfs.signs_of_main_thread()
        else:
            signs = procfs.moved_by(thread.native_id or 0)
        # A rank that only waits for others makes no progress, whatever it reads and writes.
        if signs != self._signs and not diagnosis.waits(stack):
            self._moved_at = now
        self._signs, self._queued = signs, queued
        return now - self._moved_at

    def stack(self) -> list[str]:
        """Where the main thread, or the one that it waits for, is; innermost call last."""
        thread = self._waits_for or threading.main_thread()
        frame = sys._current_frames().get(thread.ident or 0)
        entries = traceback.extract_stack(frame)[-STACK_DEPTH:] if frame else []
        return [f"{entry.filename}:{entry.lineno} in {entry.name}" for entry in entries]
