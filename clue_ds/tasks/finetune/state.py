"""state.pt: what an interrupted fine-tuning run resumes from, with a checksum at its end.

    the file of torch.save | MARK | SHA-256 of all before MARK, 32 bytes

Guarantees: the file is the old one or the new one after a kill, and on disk when `save` returns; a
file that is truncated, damaged or without a checksum (as earlier versions wrote it) is never
resumed from; only tensors and plain values are unpickled. torch.load ignores the bytes at the end,
so the file opens in torch as before.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Any, cast

import torch

from clue_ds import files
from clue_ds.errors import UserError
from clue_ds.tasks import outputs

MARK = b"clue_ds sha256: "


class _Hashing:
    """A file for torch.save that hashes what is written and keeps the first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace the state file; UserError when the disk is full."""
    with outputs.explained(path, "give another --output"), files.writing(path) as file:
        hashing = _Hashing(file)
        try:
            torch.save(state, cast(IO[bytes], hashing))
        except RuntimeError:  # torch's own report of an error that `write` raised
            if hashing.error is None:
                raise
            raise hashing.error from None
        file.write(MARK + hashing.digest.digest())


def damage(path: Path) -> str | None:
    """Why a state file can't be resumed from; None when every byte is as it was saved."""
    digest = hashlib.sha256()
    end = len(MARK) + digest.digest_size
    left = path.stat().st_size - end
    if left <= 0:
        return f"it is truncated to {path.stat().st_size:,} bytes"
    with path.open("rb") as file:
        while left:
            block = file.read(min(left, 1 << 20))
            if not block:
                return "it is shorter than a moment ago"
            digest.update(block)
            left -= len(block)
        found = file.read()
    if not found.startswith(MARK):
        return "it has no checksum: it is truncated, damaged, or from an earlier version"
    if found != MARK + digest.digest():
        return "it has other bytes than when it was saved (SHA-256 differs)"
    return None


def load(path: Path) -> dict[str, Any]:
    """The state that `save` wrote; UserError when the file is damaged."""
    reason = damage(path)
    if reason is not None:
        raise UserError(f"can't resume from {path}: {reason}; remove it to start the run again")
    return torch.load(path, map_location="cpu", weights_only=True)
