"""Requests to stop for a process that works without a launcher and without a watchdog.

Guarantees: USR1, INT (Ctrl-C) and TERM let it save and stop after the step that it is in; a second
INT or TERM ends it at once. All processes of a pool stop when the owner of the pool is asked. The
process's handlers are given back when it has ended its work.

Rejected: the watchdog, whose heartbeats and store are of use only among several ranks, and which
sets the variables of a launcher for all that this process starts.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from clue_ds.job import signals
from clue_ds.job.heartbeat import Activity
from clue_ds.job.stop import StopRequest
from clue_ds.settings.sections import HealthSection

_current: Alone | None = None


class Alone(Activity):
    """What the main thread is doing; as a context it listens for signals in the block.

    `told`: a number that the processes of a pool share with its owner (multiprocessing's Value
    without a lock), which is 1 once one of them was asked to stop.
    """

    def __init__(self, health: HealthSection, command: str, told: Any = None) -> None:
        self._stop, self._command, self._told = StopRequest(), command, told
        self._before: dict[signal.Signals, Any] = {}
        super().__init__(health)

    def begin(self, health: HealthSection) -> None:
        super().begin(health)
        self._stop.begin()

    def step(self, step: int) -> bool:
        """A step has ended; True when this process is to save and stop now."""
        super().step(step)
        if self._told is not None and self._told.value:
            self._stop.ask()
        return self._stop.agreed(step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        was_asked = self._stop.is_asked()
        if number == signal.SIGUSR1:
            self._stop.ask()
        elif not self._stop.ask_by_signal():
            os._exit(128 + number)
        elif not was_asked:
            signals.say_that_it_stops(self._command, number)
        if self._told is not None:
            self._told.value = 1

    def __enter__(self) -> Alone:
        global _current
        _current = self
        numbers = [signal.SIGUSR1, signal.SIGTERM]
        if not signals.is_ignored(signal.SIGINT):
            numbers.append(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._on_signal) for each in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)


def current() -> Alone | None:
    """The one that listens for signals in this process."""
    return _current
