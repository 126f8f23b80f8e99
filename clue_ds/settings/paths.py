"""`~` and `$NAME` in paths that a user gives, in a YAML file or on the command line.

A shell expands them only outside quotes and at the beginning of a word, so `--output=~/x`, sbatch
files and YAML pass them on as they are, and a directory called `~` invites `rm -r ~`.

Guarantee: `expand` returns a path without them or raises a UserError. It is applied where settings
come in: to the fields of type PathText in a config and a task file, and to arguments of verbs.
"""

from __future__ import annotations

import os
import re

from clue_ds.errors import UserError, shorten

VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*")


def expand(path: str) -> str:
    """`path` with `~`, `~user` and `$NAME` replaced; a UserError where there is no such thing."""
    expanded = os.path.expandvars(path)
    unknown = VARIABLE.search(path) and VARIABLE.search(expanded)
    if unknown:
        raise UserError(
            f"path {shorten(path)}: the variable {unknown[0].lstrip('${')} is not set; set it, or "
            "write the whole path"
        )
    if not path.startswith("~"):
        return expanded
    expanded = os.path.expanduser(expanded)
    if expanded.startswith("~"):
        name = expanded.partition("/")[0]
        raise UserError(
            f"path {shorten(path)}: the home directory of {name} is not known; write the whole "
            f"path, or ./{name} for a file of that name"
        )
    return expanded
