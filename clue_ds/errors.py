"""The kind of error that a user's mistake raises, and how a command ends on any error.

Guarantees: a `UserError`, or a file that the system can't open or write (no permission, disk full,
a read-only disk, a path below a file), is printed as one message without a traceback and ends the
process with status 2; Ctrl-C prints one line and ends it with the shell's status 130. Every other
exception is a bug of ours: one line says what was being done and in which file the traceback, the
versions and the command are, and the status is 70. CLUE_DS_TRACEBACK=1 prints tracebacks, too.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import math
import os
import platform
import reprlib
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clue_ds.launcher.contract import STATUS_EXCEPTION, STATUS_USER_ERROR
from clue_ds.settings import startup

TRACEBACK_VARIABLE = "CLUE_DS_TRACEBACK"
PACKAGES = ("clue_ds", "torch", "deepspeed", "transformers", "numpy")

# What the system says about a file -> what is wrong, and what to do.
ADVICE = {
    errno.ENOENT: "{} does not exist; check the path",
    errno.EACCES: "this user may not read or write {}; change its permissions, or give another "
    "path",
    errno.EPERM: "this user may not change {}; change its permissions, or give another path",
    errno.ENOSPC: "the disk is full, so {} can't be written; free some space, or give another path",
    errno.EDQUOT: "your quota on the disk is used up, so {} can't be written; free some space, or "
    "give another path",
    errno.EFBIG: "{} is larger than the disk or `ulimit -f` allows; give another path",
    errno.EROFS: "{} is on a disk that can only be read; give another path",
    errno.ENOTDIR: "a part of the path {} is a file and no directory; give another path",
    errno.EISDIR: "{} is a directory; give the path of a file",
    errno.EEXIST: "{} exists already; give another path, or remove it",
    errno.ENOTEMPTY: "the directory {} is not empty; give another path, or empty it",
    errno.ELOOP: "{} is a symbolic link that leads back to itself; correct the link",
    errno.ENAMETOOLONG: "{} is a name too long for the file system; give a shorter one",
    errno.EIO: "the disk of {} reports an error; look at `dmesg` on its machine",
    errno.ESTALE: "{} is gone from its file server; mount it again",
    errno.EMFILE: "this process has too many open files to open {}; raise `ulimit -n`",
    errno.ENFILE: "this machine has too many open files to open {}; end other programs",
    errno.ENXIO: "{} is a socket, or a device that nobody serves; give the path of a file",
    errno.ETXTBSY: "{} is a program that is running; give another path",
}
# Of those, the ones that are no bug even where the system doesn't say which file it was.
WITHOUT_NAME = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE)


class UserError(ValueError):
    """The message tells what is wrong, where (file, line or byte; rank, step), and what to do."""


def shorten(value: Any, quoted: bool = True, limit: int = 120) -> str:
    """`value` for a message, cut where it is long; text gets quotes unless `quoted` is False."""
    if isinstance(value, str) and not quoted:
        value = " ".join(value[: 4 * limit].split())
        return value if len(value) <= limit else value[: limit - 3] + "..."
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = limit
    brief.maxlevel = 3
    return brief.repr(value)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not empty, or the exception's name."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def run_command(command: str, function: Callable[[], object]) -> int:
    """Run `function`; return the exit status: 0, 2 after a UserError, 70 after a bug, or 130."""
    try:
        function()
    except BrokenPipeError:
        raise
    except UserError as error:
        return _end(command, str(error))
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        said = explain_os_error(error) if isinstance(error, OSError) else None
        if said is not None:
            return _end(command, said)
        print(f"{command}: error: {_report(command, error)}", file=sys.stderr)
        return STATUS_EXCEPTION
    return 0


def run_module(command: str, main: Callable[[list[str]], object]) -> int:
    """The entry of `python -m MODULE ARGUMENTS...`, with which launchers start a rank."""
    startup.prepare()
    return run_command(command, lambda: main(sys.argv[1:]))


def _end(command: str, message: str) -> int:
    print(f"{command}: error: {message}", file=sys.stderr)
    if _shows_traceback():
        traceback.print_exc()
    return STATUS_USER_ERROR


def _shows_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")


def explain_os_error(error: OSError) -> str | None:
    """One sentence for a problem with a file or disk; None for an error that may be a bug."""
    advice = ADVICE.get(error.errno or 0)
    if error.filename is not None and not isinstance(error.filename, int):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name]
        return (advice or f"{{}}: {error.strerror}").replace(
            "{}", shorten(" -> ".join(names), quoted=False, limit=400)
        )
    if error.errno in WITHOUT_NAME and advice is not None:
        return advice.replace("{}", "a file (the system doesn't say which)")
    return None


def _report(command: str, error: Exception) -> str:
    """Write the traceback to a file; returns what failed, where, and the name of that file."""
    text = "".join(traceback.format_exception(error))
    if _shows_traceback():
        print(text, end="", file=sys.stderr)
    # By names of modules: a clone called clue_ds may hold the environment, torch included.
    ours = [
        f"{Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith("clue_ds.")
    ]
    place = f" in {ours[-1]}" if ours else ""
    what = f"{type(error).__name__}: {shorten(first_line(error), quoted=False, limit=200)}"
    header = f"command: {shlex.join(sys.argv)}\n{_versions()}\n\n"
    path = _write_report(header + text)
    where = (
        f"the traceback is in {path}" if path else f"{TRACEBACK_VARIABLE}=1 prints the traceback"
    )
    return f"unexpected error{place}: {what}; this is a bug of {command.split()[0]}: {where}"


def _versions() -> str:
    found = [f"python {platform.python_version()}", platform.platform()]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return f"versions: {', '.join(found)}"


def _write_report(text: str) -> Path | None:
    """A new file in the current or the temporary directory; None where neither can be written."""
    name = f"clue-ds-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (os.curdir, tempfile.gettempdir()):
        path = Path(folder, name)
        with contextlib.suppress(OSError):
            path.write_bytes(text.encode("utf-8", "backslashreplace"))
            return path.absolute()
    return None


def check_least(name: str, value: float | None, least: int) -> None:
    """UserError unless a setting is a number of at least `least`, or None, which is a default."""
    if value is not None and not least <= value < math.inf:
        raise UserError(f"{name} {value} must be at least {least}")


def existing_file(path: str | Path, what: str) -> Path:
    """Return `path` as a Path, or raise a UserError that names `what` is missing."""
    path = Path(path)
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long, or a directory that may not be entered
        reason = f"can't be opened: {error.strerror}"
    else:
        reason = "" if is_file else _why_no_file(path)
    if reason:
        raise UserError(f"{what} {path} {reason}; give the path of an existing file")
    return path


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "is a directory"
    if path.is_symlink():
        return f"is a symbolic link to {os.readlink(path)}, which does not exist"
    return "is not a regular file" if path.exists() else "does not exist"
