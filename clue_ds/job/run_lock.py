"""The sign that a process trains into a run directory: a file that it touches.

Guarantees: a process doesn't train into a run directory into which another one trains, here or on
another machine, nor do two that start at the same moment; a run that was killed keeps nobody out
for longer than SECONDS_UNTIL_DEAD. A thread of its own gives the signs, so that a slow disk delays
nobody.

Rejected: a lock of the file system, which shared disks often don't have and which says not whose.
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

FILE, SECONDS_BETWEEN_SIGNS = "alive.json", 10.0
# A sign may be late by a slow disk; a run that missed three is gone.
SECONDS_UNTIL_DEAD = 3 * SECONDS_BETWEEN_SIGNS


def claim(run_dir: str | Path, me: Peer, end: threading.Event) -> str | None:
    """Take `run_dir` for this process and give signs until `end`; the message when it is taken."""
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
            # Two that start at this same moment over what a killed run left could both get through.
            path.unlink(missing_ok=True)
    threading.Thread(target=_sign_until, args=(path, end), daemon=True).start()
    atexit.register(withdraw, run_dir)
    return None


def _sign_until(path: Path, end: threading.Event) -> None:
    while not end.wait(SECONDS_BETWEEN_SIGNS):
        with contextlib.suppress(OSError):  # a full or slow disk is not the run's death
            os.utime(path)


def _holder(path: Path, me: Peer) -> Peer | None:
    """Who gives the signs in `path`; None when nobody does any more.

    A process of this machine is looked up; from another machine the next sign is waited for.
    """
    first_sign = None
    while True:
        try:
            sign = path.stat().st_mtime
            other: Peer | None = Peer(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # being written, or left by a full disk
            other = None
        if other == me or time.time() - sign > SECONDS_UNTIL_DEAD:
            return None
        if other is not None and other[::2] == me[::2]:
            return None if procfs.state(other.pid) == "dead" else other
        if first_sign is None:
            first_sign = sign
            print(
                f"{path}: at most {SECONDS_UNTIL_DEAD:.0f} s to see whether that run is alive",
                flush=True,
            )
        if other is not None and sign != first_sign:
            return other
        time.sleep(0.2)


def _refusal(run_dir: str | Path, other: Peer) -> str:
    return (
        f"run_dir {run_dir} is in use: process {other.pid} on {other.host} trains into it. Let it "
        f"end, or have it save and stop (on {other.host}: kill -USR1 {other.pid}), or give another "
        "run_dir"
    )


def withdraw(run_dir: str | Path) -> None:
    """The run has ended, and not without a word."""
    Path(run_dir, FILE).unlink(missing_ok=True)
