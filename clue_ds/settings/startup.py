"""Prepares a process for our code, whatever machine, locale or container started it.

Guarantees after `prepare`: Python runs in UTF-8 mode, also in every child process, so that
arguments, file names and files are read as UTF-8 whatever LANG says; a character that the output's
encoding lacks is written as an escape instead of ending the command; there is a home directory and
a user name, even for a user id without an entry in the password file.

Only entry points call it: the console script and `python -m` of a module that a launcher starts.
UTF-8 mode can't be switched on in a running interpreter, and libraries read their own source files
with the locale's encoding (torch's inductor fails under GB18030), so the process starts again with
`-X utf8`. It keeps its process id, its open files and its ignored signals, hence srun, mpirun and
DeepSpeed don't notice. The arguments come from /proc as bytes: decoding and encoding them by a
multi-byte locale doesn't always give the same bytes back.
"""

from __future__ import annotations

import io
import os
import pwd
import sys
import tempfile
from pathlib import Path

USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # in getpass' order


def prepare() -> None:
    """Restart in UTF-8 mode if need be, make output tolerant, and provide a home directory."""
    _use_utf8()
    _provide_home()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _use_utf8() -> None:
    os.environ["PYTHONUTF8"] = "1"  # for child processes
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    # -X utf8 also works with -E and -I, which make Python ignore PYTHONUTF8.
    os.execv(sys.executable, [os.fsencode(sys.executable), b"-X", b"utf8", *_arguments()])


def _arguments() -> list[bytes]:
    """This process' command line after the interpreter, as the kernel received it."""
    try:
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:  # not Linux, or /proc is not mounted
        words = list(map(os.fsencode, sys.orig_argv))
    return words[1:]


def _provide_home() -> None:
    """Set HOME and USER where libraries would fail without them, or make a folder called `~`."""
    try:
        home = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        home = ""
        if not any(os.environ.get(name) for name in USER_VARIABLES):
            os.environ["USER"] = str(os.getuid())
    if not os.environ.get("HOME"):
        os.environ["HOME"] = home or _temporary_home()


def _temporary_home() -> str:
    """A directory of this user alone that the next command finds again."""
    path = Path(tempfile.gettempdir(), f"clue-ds-home-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or path.is_symlink():
        return tempfile.mkdtemp(prefix="clue-ds-home-")  # the other one belongs to somebody else
    return str(path)
