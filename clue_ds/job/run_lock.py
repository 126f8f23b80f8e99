"""The run lock: a file in the run directory that the process which trains there touches regularly.

Guarantees: two processes never train in one run directory, on one machine or on two, even when they
start at the same moment (unless both find the lock of a killed run); the lock of a run that was
killed keeps others out for at most SECONDS_UNTIL_DEAD. A separate thread touches the file, so a
slow disk does not delay training.

Rejected: a lock of the file system. Shared disks often have none, and it does not tell the owner.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from pathlib import Path

from clue_ds.job import procfs
from clue_ds.job.rendezvous import Peer

FILE, SECONDS_BETWEEN_TOUCHES = "alive.json", 10.0
# A slow disk may delay one touch; a run that missed three is dead.
SECONDS_UNTIL_DEAD = 3 * SECONDS_BETWEEN_TOUCHES


def claim(run_dir: str | Path, me: Peer, end: threading.Event) -> str | None:
    """Lock `run_dir` for this process until `end`; the message when another process holds it."""
    path = Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            with path.open("x") as file:
                file.write(json.dumps(me._asdict()) + "\n")
            break
        except FileExistsError:
            other = _holder(path, me)
            if other is not None:
                return _refusal(run_dir, other)
            # Two processes that find a dead lock at the same moment could both pass here.
            path.unlink(missing_ok=True)
    threading.Thread(target=_touch_until, args=(path, end), daemon=True).start()
    atexit.register(withdraw, run_dir)
    return None


def _touch_until(path: Path, end: threading.Event) -> None:
    while not end.wait(SECONDS_BETWEEN_TOUCHES):
        with contextlib.suppress(OSError):  # the run survives a full or slow disk
            os.utime(path)


def _holder(path: Path, me: Peer) -> Peer | None:
    """The living process that holds the lock `path`; None when there is none.

    A process on this machine is looked up; for one on another machine, wait for its next touch.
    """
    first_touch = None
    while True:
        try:
            touched = path.stat().st_mtime
            other: Peer | None = Peer(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # it is being written, or a full disk cut it off
            other = None
        if other == me or time.time() - touched > SECONDS_UNTIL_DEAD:
            return None
        if other is not None and other[::2] == me[::2]:
            return None if procfs.state(other.pid) == "dead" else other
        if first_touch is None:
            first_touch = touched
            print(
                f"{path}: waiting up to {SECONDS_UNTIL_DEAD:.0f} s to see if that run is alive",
                flush=True,
            )
        if other is not None and touched != first_touch:
            return other
        time.sleep(0.2)


def _refusal(run_dir: str | Path, other: Peer) -> str:
    return (
        f"run_dir {run_dir} is in use: process {other.pid} on {other.host} trains in it. Wait "
        f"until it ends, or make it save and stop (on {other.host}: kill -USR1 {other.pid}), or "
        "give another run_dir"
    )


def withdraw(run_dir: str | Path) -> None:
    """Remove the lock at the normal end of the run."""
    Path(run_dir, FILE).unlink(missing_ok=True)
