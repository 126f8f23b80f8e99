"""Write the files of a verb: a disk that is full or a path that can't be is one message."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from clue_ds import files
from clue_ds.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained(path: Path, what_to_do: str = "give another path") -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into a UserError."""
    try:
        yield
    except OSError as error:
        advice = "free some space on that disk" if error.errno in FULL else what_to_do
        place = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        raise UserError(f"can't write {path}{place}: {error.strerror or error}; {advice}") from None


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` by UTF-8 text, or leave it as it is."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; give the path of a file")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, text)
