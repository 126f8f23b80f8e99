"""The kind of error that a user's mistake raises, and how a command ends on it.

Guarantees: a `UserError`, or a file that the user may not open, is printed as one message without a
traceback and ends the process with status 2; Ctrl-C prints one line and ends it with the shell's
status 130; every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """The message tells what is wrong, where (file, line or byte; rank, step), and what to do."""


def run_command(command: str, function: Callable[[], object]) -> int:
    """Run `function`; return the exit status: 0, 2 after printing a UserError, 130 after Ctrl-C."""
    try:
        function()
    except UserError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        if error.filename is None:
            raise
        print(
            f"{command}: error: this user may not read or write {error.filename}; change its "
            "permissions, or give another path",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def existing_file(path: str | Path, what: str) -> Path:
    """Return `path` as a Path, or raise a UserError that names `what` is missing."""
    path = Path(path)
    if not path.is_file():
        reason = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(f"{what} {path} {reason}; give the path of an existing file")
    return path
