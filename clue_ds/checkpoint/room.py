"""The directory of a checkpoint before it is written: room on its disk, and failed writes.

Guarantees: every message names the disk, the room that is there and the room that is needed, and
says that the earlier checkpoints are untouched.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors

from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import permissions, retention
from clue_ds.errors import UserError, first_line
from clue_ds.files import size_text

# At the start there must be room for a checkpoint being written beside the one that it replaces,
# and a tenth more, because other files grow in the meantime.
CHECKPOINTS_AT_START = 2.2


def prepare_folder(folder: Path, num_bytes: int) -> list[str]:
    """Make the folder of checkpoints and remove what dead processes left there; returns notes.

    UserError when the disk has too little room or does not keep owners and modes; the caller holds
    the run lock. That is checked here, rather than after the hours until the first checkpoint.
    """
    with clear_write_errors(folder, num_bytes):
        folder.mkdir(parents=True, exist_ok=True)
        removed = retention.remove_leftovers(folder)
        message = no_room_to_start(folder, num_bytes) or permissions.problem(folder)
    if message is not None:
        raise UserError(message)
    if removed:
        return [f"removed {', '.join(removed)}, which a run that died left in {folder}"]
    return []


def prepare(staging: Path, num_bytes: int, relief: str = "") -> None:
    """Make an empty directory for a checkpoint; UserError when the checkpoint does not fit.

    `relief`: what beside free space would help.
    """
    with clear_write_errors(staging, num_bytes):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        message = no_room(staging, num_bytes, relief)
    if message is not None:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(message)


def no_room_to_start(folder: Path, num_bytes: int) -> str | None:
    """The message when fewer than CHECKPOINTS_AT_START checkpoints fit; else None.

    Those that are there count as room: new ones replace them.
    """
    taken = sum(
        path.stat().st_size
        for directory in manifests.published(folder)
        for path in directory.rglob("*")
        if path.is_file()
    )
    free = shutil.disk_usage(folder).free
    needed = round(CHECKPOINTS_AT_START * num_bytes)
    if free + taken >= needed and free >= num_bytes:
        return None
    return (
        f"the disk of {folder} has {size_text(free)} free, and its checkpoints take "
        f"{size_text(taken)}. A checkpoint needs about {size_text(num_bytes)}, and a run needs "
        f"room for {CHECKPOINTS_AT_START} of them ({size_text(needed)}), because a new one is "
        "complete before the oldest is deleted. Free some space, or give the run another directory"
    )


def no_room(directory: Path, num_bytes: int, relief: str = "") -> str | None:
    """The message when the disk of `directory` has less than `num_bytes` free; else None."""
    free = shutil.disk_usage(directory).free
    if free >= num_bytes:
        return None
    return (
        f"the disk of {directory} has {size_text(free)} free, but a checkpoint needs about "
        f"{size_text(num_bytes)}; the earlier checkpoints are untouched. Free some space"
        f"{relief and f' (or {relief})'} and start the same command again: it resumes"
    )


@contextlib.contextmanager
def clear_write_errors(path: Path, num_bytes: int) -> Iterator[None]:
    """Turn errors in writing the checkpoint `path` into one message for the user."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch's zip writer reports a failed write as a RuntimeError that names the writer.
        if isinstance(error, RuntimeError) and not _failed_write(error):
            raise
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        raise UserError(
            f"can't write the checkpoint {path}: {first_line(error)}; the earlier "
            f"checkpoints are untouched. The disk of {existing} has "
            f"{size_text(shutil.disk_usage(existing).free)} free, and a checkpoint needs about "
            f"{size_text(num_bytes)}; a quota of this user may allow less. Make room on that disk "
            "(or move the run) and start the same command again: it resumes"
        ) from error


def _failed_write(error: RuntimeError) -> bool:
    words = ("PytorchStreamWriter", "inline_container", "iostream", "write")
    return any(word in str(error) for word in words)
