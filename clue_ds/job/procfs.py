"""What the kernel says of a process: is it alive, stopped, does it get on?

Guarantees: reads /proc and changes nothing. A save of an hour moves bytes all the time; a read from
a dead disk never does, nor does a thread that spins.

Rejected: a sign of life from inside every long loop (DeepSpeed's and torch's loops are not ours).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")
SELF = PROC / "self"
# Fields of /proc/PID/stat behind the name, as proc(5) numbers them minus 3.
STATE, MAJOR_FAULTS, USER, SYSTEM, USER_OF_CHILDREN, SYSTEM_OF_CHILDREN = 0, 9, 11, 12, 13, 14


def _fields(folder: Path) -> list[str]:
    """Of `stat`; the name before them may hold blanks and parentheses. OSError when it is gone."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def state(pid: int) -> str:
    """dead, stopped or alive."""
    try:
        letter = _fields(PROC / str(pid))[STATE]
    except (OSError, IndexError):
        return "dead"
    return {"Z": "dead", "X": "dead", "T": "stopped", "t": "stopped"}.get(letter, "alive")


def signs_of_main_thread() -> int:
    """A number that changes when the main thread gets on with its files, or has compilers at work.

    Bytes read or written, page faults that read a disk, and processor ticks of child processes; its
    own ticks and the other threads of this process don't count.
    """
    folder = SELF / "task" / str(os.getpid())
    fields = _fields(folder)
    try:
        moved = sum(int(line.split()[1]) for line in (folder / "io").read_text().splitlines())
    except OSError:  # not every kernel counts bytes, but moving them takes it time
        moved = int(fields[SYSTEM])
    total = int(fields[MAJOR_FAULTS]) + moved
    return total + sum(_work_of_children(each) for each in (SELF / "task").iterdir())


def seconds_in_the_queue() -> float:
    """How long the main thread, ready to run, has had to wait for a processor, in all."""
    try:
        _, nanoseconds, _ = (SELF / "task" / str(os.getpid()) / "schedstat").read_text().split()
    except OSError:  # a kernel without scheduler statistics
        return 0.0
    return int(nanoseconds) / 1e9


def _work_of_children(task: Path) -> int:
    """Ticks of the processes below a thread, those that have ended included where that is known."""
    total = 0
    with contextlib.suppress(OSError):  # one that ends meanwhile is counted by its parent
        for pid in (task / "children").read_text().split():
            fields = _fields(PROC / pid)
            places = (USER, SYSTEM, USER_OF_CHILDREN, SYSTEM_OF_CHILDREN)
            total += sum(int(fields[place]) for place in places)
            total += sum(_work_of_children(each) for each in (PROC / pid / "task").iterdir())
    return total
