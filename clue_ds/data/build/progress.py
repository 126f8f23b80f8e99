"""Progress of `clue-ds shard`: a bar on a terminal, a line every 30 seconds in a log.

Both show the rate and the time left. The rate is the mean since the run began, without what an
earlier run had finished. Rejected: the rate of the last few seconds, which is often unknown,
because a shard takes seconds and several are finished at once.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from clue_ds.files import size_text

LOG_SECONDS = 30.0


class ShardProgress:
    """Bytes done of `total` (None: unknown), written to standard error."""

    def __init__(self, total: int | None, bar: Any, now: float | None = None) -> None:
        self._total = total
        self._bar = bar
        self._task = bar.add_task("sharding", total=total, state="") if bar else None
        self._start = self._last_line = time.monotonic() if now is None else now
        self._done = self._found = 0

    def advance(self, num_bytes: int, found: bool = False, now: float | None = None) -> None:
        """Count `num_bytes` more as done; `found` says that an earlier run did them."""
        now = time.monotonic() if now is None else now
        self._done += num_bytes
        self._found += num_bytes * found
        if self._bar:
            self._bar.update(self._task, advance=num_bytes, state=self.state(now))
        elif now - self._last_line >= LOG_SECONDS:
            self._last_line = now
            print(f"sharding: {self.state(now)}", file=sys.stderr, flush=True)

    def state(self, now: float) -> str:
        """The progress as text, such as "1.2 GiB of 3.4 GiB, 95.0 MiB/s, 0:00:23 left"."""
        worked, seconds = self._done - self._found, now - self._start
        size = size_text(self._done)
        size += "" if self._total is None else f" of {size_text(self._total)}"
        if worked <= 0 or seconds <= 0:
            return size
        rate = worked / seconds
        text = f"{size}, {size_text(rate)}/s"
        if self._total is not None:
            minutes, left = divmod(int(max(0, self._total - self._done) / rate), 60)
            text += f", {minutes // 60}:{minutes % 60:02}:{left:02} left"
        return text


@contextlib.contextmanager
def open_progress(total: int | None) -> Iterator[ShardProgress]:
    """A bar if standard error is a terminal, else lines."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield ShardProgress(total, None)
        return
    columns = ("{task.description}", progress.BarColumn(), "{task.fields[state]}")
    with progress.Progress(*columns, console=console) as bar:
        yield ShardProgress(total, bar)
