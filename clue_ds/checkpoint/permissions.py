"""Who could have changed a checkpoint: its owner and its mode.

Guarantees: what is saved can be changed by this user alone, whatever the umask; a checkpoint that
another user owns or could have written to is refused before anything in it is read. root is
trusted. The directories above a checkpoint may be writable by a group, as they are where people
share a project: whoever replaces a checkpoint there leaves files that belong to him.

Rejected: accepting a group that has no other members, because directory services often don't list
them.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from clue_ds.errors import UserError

# A name that the next start removes if this process dies (retention.py); no step has this number.
PROBE = "step-00000000.tmp"
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def close_to_others(path: Path) -> None:
    """Take the permission to write `path` from its group and from all others."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & WRITABLE_BY_OTHERS:
        path.chmod(mode & ~WRITABLE_BY_OTHERS)


def check(directory: Path) -> None:
    """UserError when a user other than this one or root could have changed the checkpoint."""
    for path in (directory, *sorted(directory.rglob("*"))):
        check_one(path, directory)


def check_one(path: Path, directory: Path) -> None:
    """As `check`, for one file of the checkpoint `directory`; a file that is gone passes."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise UserError(
            f"{path} belongs to user {status.st_uid}, neither to you nor to root, so it may hold "
            "anything; if you trust that user, make your own copy of the checkpoint and use that: "
            f"cp -r {directory} ELSEWHERE"
        )
    if status.st_mode & WRITABLE_BY_OTHERS:
        who = "every user" if status.st_mode & stat.S_IWOTH else "every member of its group"
        raise UserError(
            f"{path} can be changed by {who} (mode {stat.S_IMODE(status.st_mode):04o}), so it may "
            "not be what was saved; if you trust them, close it and start the same command again: "
            f"chmod -R go-w {directory}"
        )


def problem(folder: Path) -> str | None:
    """The message when checkpoints that this process saves in `folder` would be refused later."""
    probe = folder / PROBE
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir(mode=0o755)
    try:
        check(probe)
    except UserError:
        status = probe.stat()
        return (
            f"the disk of {folder} shows what this process (user {os.geteuid()}) writes as owned "
            f"by user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}, so anybody "
            "could change its checkpoints, and no run would resume from them; put the run on a "
            "disk that keeps owners and modes"
        )
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    return None
