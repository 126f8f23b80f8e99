"""Signals that a thread reads from a pipe, and output whose reader is gone.

Python runs a signal handler in the main thread and between two of its own instructions, so a rank
inside a collective would notice nothing. The kernel's part of a handler does run at once, and
writes the number of the signal into a socket, which the watch thread reads.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable


class SignalPipe:
    """The signals `numbers` of this process. Made in the main thread; `read` works in any."""

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        _pipes.append(self)
        self._poll = select.poll()
        with contextlib.suppress(OSError, ValueError):
            self._poll.register(sys.stdout.fileno(), 0)

    def read(self, seconds: float) -> list[int]:
        """The signals that have arrived, after waiting for the first for up to `seconds`."""
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            if select.select([self._reader], [], [], seconds)[0]:
                return list(self._reader.recv(64))
        return []

    def output_is_broken(self) -> bool:
        """Whether nobody reads standard output any more."""
        broken = select.POLLERR | select.POLLHUP
        return any(event & broken for _, event in self._poll.poll(0))

    def close(self) -> None:
        """Signals that arrive from now on change nothing."""
        signal.set_wakeup_fd(-1)
        self._reader.close()

    def restore(self) -> None:
        """Give the signals back to those who handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)


_pipes: list[SignalPipe] = []


def restore() -> None:
    """Give all signals back, when a run has ended in a process that goes on."""
    while _pipes:
        _pipes.pop().restore()


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started to ignore the signal: a shell's background job and INT."""
    return signal.getsignal(number) == signal.SIG_IGN


def discard_output() -> None:
    """Send standard output and standard error to /dev/null."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(null, stream.fileno())
    os.close(null)


def say_that_it_stops(command: str, number: int) -> None:
    """Tell the user what the first INT or TERM does."""
    # RuntimeError: a handler that interrupted the main thread while that wrote to the same stream.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print(
            f"{command}: {signal.Signals(number).name} received: the run saves after this step and "
            "stops; a second signal ends it at once, without saving",
            file=sys.stderr,
            flush=True,
        )
