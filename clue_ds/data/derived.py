"""Files that are made from a corpus and kept for later starts: `open_derived` finds or makes one.

Guarantees: the corpus's directory is not touched. The file is beside it, in NAME.index/, or in the
user's cache (XDG_CACHE_HOME) where NAME.index/ can't be written or would be inside another corpus
(held_out). It records what it was made of and a checksum of all its bytes: a file that is stale,
cut off or changed is made again, with a line on stderr. It appears under its name complete or not
at all. Of processes that start together one makes it while the others wait (flock; on a file system
without locks each of them makes it, with the same bytes).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clue_ds import files
from clue_ds.data.corpus import MANIFEST, Corpus

# magic with format version, SHA-256 that says what it was made of, CRC-32 of the rest.
_HEADER = struct.Struct("<8s32sQ")


class DerivedFile(NamedTuple):
    """What file is looked for."""

    name: str
    magic: bytes  # 8 bytes
    key: bytes  # 32 bytes: which corpus, and which rules, it must have been made of
    what: str  # begins each line on stderr


class Unusable(Exception):
    """A file is not the one that was looked for; the message is the reason."""


def open_derived(
    corpus: Corpus, file: DerivedFile, make: Callable[[Path | None], list[np.ndarray]]
) -> np.ndarray:
    """The body of a file, uint8, mapped; `make` returns its arrays where no usable one is found.

    `make` gets the path at which they will be saved, or None where there is no place for them.
    """
    folders = _folders(corpus)
    for folder in folders:
        try:
            return read(folder / file.name, file)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except Unusable as error:
            say(file, f"{folder / file.name} {error}; it is made again")
    for folder in folders:
        if _can_write(folder):
            return _make(corpus, folder / file.name, file, make)
    say(file, f"that of {corpus.directory} can't be saved: it is made again at each start")
    return np.concatenate([array.reshape(-1).view(np.uint8) for array in make(None)])


def _folders(corpus: Corpus) -> list[Path]:
    """The folders in which files of the corpus may be, best one first."""
    directory = corpus.directory.resolve()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clue_ds"
    folders = [cache / f"{corpus.fingerprint[:16]}.index"]
    if not (directory.parent / MANIFEST).is_file():
        folders.insert(0, directory.with_name(directory.name + ".index"))
    return folders


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _make(
    corpus: Corpus,
    path: Path,
    file: DerivedFile,
    make: Callable[[Path | None], list[np.ndarray]],
) -> np.ndarray:
    """Write the file, unless another process has just done so, and map it."""
    with _only_one(path.with_name(path.name + ".lock"), corpus, file):
        with contextlib.suppress(FileNotFoundError, Unusable):
            return read(path, file)
        write(path, file, make(path))
        return read(path, file)


@contextlib.contextmanager
def _only_one(lock: Path, corpus: Corpus, file: DerivedFile) -> Iterator[None]:
    """Hold a lock while the block runs; the system releases it when its process ends."""
    with open(lock, "w") as opened:
        if not files.lock(opened, wait=False):
            say(file, f"waiting for another process, which makes that of {corpus.directory}")
            files.lock(opened, wait=True)
        yield


def write(path: Path, file: DerivedFile, arrays: Iterable[np.ndarray], shared: bool = True) -> None:
    """Write little-endian arrays behind a header; `shared` as in `files.writing`."""
    arrays = list(arrays)
    checksum = 0
    for array in arrays:
        checksum = zlib.crc32(array.data, checksum)
    with files.writing(path, shared=shared) as opened:
        opened.write(_HEADER.pack(file.magic, file.key, checksum))
        for array in arrays:
            opened.write(array.data)


def read(path: Path, file: DerivedFile) -> np.ndarray:
    """The body of the file at `path`. Raises FileNotFoundError, or Unusable with the reason."""
    with open(path, "rb") as opened:
        header = opened.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(file.magic):
            raise Unusable("is damaged or of another format")
        _, key, checksum = _HEADER.unpack(header)
        if key != file.key:
            raise Unusable("belongs to another state of the corpus")
        found = 0
        while block := opened.read(1 << 20):
            found = zlib.crc32(block, found)
        if found != checksum:
            raise Unusable("is damaged, as its checksum shows")
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(data, np.uint8, offset=_HEADER.size)


def say(file: DerivedFile, line: str) -> None:
    """Print a line on stderr."""
    print(f"{file.what}: {line}", file=sys.stderr, flush=True)
