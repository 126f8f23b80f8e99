"""How this user's shell starts our command, for the commands that we print.

`make demo` and `.venv/bin/clue-ds` work without an activated environment, and a printed `clue-ds`
would then be "command not found" or the one of another environment.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

NAME = "clue-ds"


def command(*words: object) -> str:
    """A line that starts `clue-ds WORDS...` in the shell and directory of this process."""
    return " ".join([_program(), *(shlex.quote(str(word)) for word in words)])


def _program() -> str:
    """`clue-ds` where PATH leads to ours; or else its path, or this Python with our module."""
    found = shutil.which(NAME)
    ours = Path(sys.executable).with_name(NAME)
    if not ours.is_file():  # a user's installation beside the system's Python
        return NAME if found else f"{shlex.quote(sys.executable)} -m clue_ds.cli"
    if found is not None and os.path.samefile(found, ours):
        return NAME
    here = Path.cwd()
    shown = ours.relative_to(here) if ours.is_relative_to(here) else ours
    return shlex.quote(str(shown))
