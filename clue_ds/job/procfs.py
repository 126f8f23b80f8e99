"""What the kernel knows of a process: whether it is alive or stopped, and makes progress.

Guarantees: this module reads /proc and changes nothing. Even a save that takes an hour moves bytes
all the time; a read from a dead disk moves none, and neither does an infinite loop.

Rejected: a call in every long loop (the loops of DeepSpeed and torch are not ours).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

PROC = Path("/proc")
SELF = PROC / "self"
# Fields of /proc/PID/stat after the name: the numbers of proc(5) minus 3.
STATE, MAJOR_FAULTS, USER, SYSTEM, USER_OF_CHILDREN, SYSTEM_OF_CHILDREN = 0, 9, 11, 12, 13, 14
STARTED = 19


def _fields(folder: Path) -> list[str]:
    """Fields of `stat` after the name, which may hold spaces and parentheses; OSError if gone."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def state(pid: int) -> str:
    """The state of a process: dead, stopped or alive."""
    try:
        letter = _fields(PROC / str(pid))[STATE]
    except (OSError, IndexError):
        return "dead"
    return {"Z": "dead", "X": "dead", "T": "stopped", "t": "stopped"}.get(letter, "alive")


def started(pid: int) -> int:
    """When a process started, in clock ticks after the boot; 0 when there is no such process.

    The kernel reuses numbers of processes, but not with the same start.
    """
    try:
        return int(_fields(PROC / str(pid))[STARTED])
    except (OSError, IndexError):
        return 0


def boot_id() -> str:
    """A random name of this machine's last boot; containers on one machine share it."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def signs_of_main_thread() -> int:
    """A number that changes when the main thread reads or writes, or when child processes work.

    It sums bytes read and written, page faults that read a disk, and processor ticks of child
    processes. The main thread's own ticks and other threads of this process don't count.
    """
    children = sum(_work_of_children(each) for each in (SELF / "task").iterdir())
    return moved_by(os.getpid()) + children


def moved_by(thread: int) -> int:
    """A number that changes when a thread of this process reads or writes; 0 when it has ended."""
    folder = SELF / "task" / str(thread)
    try:
        fields = _fields(folder)
    except OSError:
        return 0
    try:
        moved = sum(int(line.split()[1]) for line in (folder / "io").read_text().splitlines())
    except OSError:  # some kernels count no bytes, but moving them takes system time
        moved = int(fields[SYSTEM])
    return int(fields[MAJOR_FAULTS]) + moved


def seconds_in_the_queue() -> float:
    """Total time in which the main thread was ready to run and waited for a processor."""
    try:
        _, nanoseconds, _ = (SELF / "task" / str(os.getpid()) / "schedstat").read_text().split()
    except OSError:  # a kernel without scheduler statistics
        return 0.0
    return int(nanoseconds) / 1e9


def _work_of_children(task: Path) -> int:
    """Processor ticks of a thread's descendants, including ended ones where the kernel knows."""
    total = 0
    with contextlib.suppress(OSError):  # a process that ends meanwhile is counted by its parent
        for pid in (task / "children").read_text().split():
            fields = _fields(PROC / pid)
            places = (USER, SYSTEM, USER_OF_CHILDREN, SYSTEM_OF_CHILDREN)
            total += sum(int(fields[place]) for place in places)
            total += sum(_work_of_children(each) for each in (PROC / pid / "task").iterdir())
    return total
