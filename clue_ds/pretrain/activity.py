"""What the kernel says of a process: is it alive, stopped, or at work?

Guarantees: reads /proc and changes nothing. Work is what a thread or its child processes
(compilers) use of processor and disk: a save of an hour works all the time, a read from a dead disk
never does.

Rejected: a sign of life from inside every long loop (DeepSpeed's and torch's loops are not ours),
and one long deadline for all that may be slow (a hang then costs it in full).
"""

from __future__ import annotations

import contextlib
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


def work_of_thread(thread: int) -> int:
    """A number that changes when a thread of this process, or a child process, does anything.

    Ticks of the processor, page faults that read a disk, and bytes read or written; other threads
    of this process don't count.
    """
    folder = SELF / "task" / str(thread)
    fields = _fields(folder)
    total = sum(int(fields[place]) for place in (MAJOR_FAULTS, USER, SYSTEM))
    with contextlib.suppress(OSError):  # not every kernel counts bytes
        lines = (folder / "io").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines)
    return total + sum(_work_of_children(each) for each in (SELF / "task").iterdir())


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
