"""A file layer that dies or fails at any chosen operation, in a forked process.

`run` forks, and the child calls a function. Every operation on the file system below one directory
that Python makes (open, mkdir, rename, chmod, remove, list) and every fsync is numbered; at number
`at` the child dies as by SIGKILL, so that what stands in the buffers of its process is lost, or the
operation fails with an errno. With `power_loss`, each file that was not synced is cut to half
before the child dies, as after a loss of power.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError

EVENTS = {
    "open",
    "os.chmod",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.truncate",
}
KILLED, REFUSED, TRACEBACK = 9, 2, 1


@dataclass(frozen=True)
class Fault:
    """What happens at operation `at`; `error` 0: the process dies. `at` 0: nothing happens."""

    at: int = 0
    error: int = 0
    power_loss: bool = False


def run(root: Path, function: Callable[[], Any], fault: Fault) -> tuple[int, int, str]:
    """(exit status, number of operations, what the child said) of `function` under `fault`.

    A process that died by SIGKILL has the status KILLED here.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(root, function, fault, writer)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    number, _, text = said.partition("\n")
    return os.waitstatus_to_exitcode(status), int(number or 0), text


def _child(root: Path, function: Callable[[], Any], fault: Fault, writer: int) -> None:
    status, text = TRACEBACK, ""
    counter = _Counter(root, fault)
    try:
        counter.install()
        function()
        status = 0
    except UserError as error:
        status, text = REFUSED, str(error)
    except BaseException:
        text = traceback.format_exc()
    finally:
        counter.off = True
        os.write(writer, f"{counter.number}\n{text}".encode()[:60_000])
        os._exit(status)


def _version(status: os.stat_result) -> tuple[int, int]:
    """A file as it was last written. Its inode may be that of a file that was deleted before."""
    return status.st_ino, status.st_mtime_ns


class _Counter:
    def __init__(self, root: Path, fault: Fault) -> None:
        self.root, self.fault, self.number, self.off = str(root), fault, 0, False
        self._before = {_version(p.stat()) for p in root.rglob("*") if p.is_file()}
        self._synced: set[tuple[int, int]] = set()

    def install(self) -> None:
        original = os.fsync

        def fsync(descriptor: int) -> None:
            self.operation()
            original(descriptor)
            self._synced.add(_version(os.fstat(descriptor)))

        os.fsync = fsync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and not self.off:
            path = arguments[0]
            if isinstance(path, int):  # rmtree works with descriptors
                path = os.readlink(f"/proc/self/fd/{path}")
            elif isinstance(path, str | os.PathLike) and not os.path.isabs(path):
                path = self.root  # below the directory that rmtree has open
            if os.fsdecode(path).startswith(self.root):
                self.operation()

    def operation(self) -> None:
        self.number += 1
        if self.number != self.fault.at:
            return
        self.off = True
        if self.fault.error:
            self.off = False
            raise OSError(self.fault.error, os.strerror(self.fault.error))
        if self.fault.power_loss:
            for path in Path(self.root).rglob("*"):
                if path.is_file() and _version(path.stat()) not in self._synced | self._before:
                    os.truncate(path, path.stat().st_size // 2)
        os._exit(KILLED)
