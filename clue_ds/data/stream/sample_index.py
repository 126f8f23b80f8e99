"""Where samples begin: found by one walk over a corpus's tables, then kept in a small file.

Every kind but windows follows sentence and document ends, so the place of sample i depends on all
samples before it in its shard. `open_index` walks over the tables once (some 4 ns a sentence) and
keeps the place of every 64th sample; for a corpus of more than KEPT_FROM sentences it writes the
result down, 12 bytes for 64 samples, and later starts map that file.

Guarantees: the corpus's directory is not touched. The file stands beside it, as NAME.index/, or in
the user's cache (XDG_CACHE_HOME) where it can't be written there or would lie inside another
corpus (held_out). It carries what it was made of and a checksum of all its bytes: one that is
stale, cut off or changed is made anew, and a line says so. It appears under its name complete or
not at all, and of processes that start together one makes it while the others wait (flock; on a
file system without locks each makes it, with the same bytes).

Rejected: marks in the corpus itself, made by `clue-ds shard` (lengths and kinds aren't known then),
marks for each sample (64 times the size to save 32 short steps a row).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clue_ds import files
from clue_ds.data.corpus import MANIFEST, Corpus
from clue_ds.data.stream.rows import WALKS, index_shard

# Walking over so many sentences takes as long as numba's start.
KEPT_FROM = 1 << 24
MAX_THREADS = 8
_SECONDS_A_LINE = 10.0
# magic with format version, SHA-256 of what it is an index of, CRC-32 of the rest.
_HEADER = struct.Struct("<8s32sQ")
_MAGIC = b"CLUE-IX\x01"


class Walk(NamedTuple):
    """How a corpus is cut into samples: all that spans.index_shard has to be told."""

    name: str  # of spans.WALKS
    width: int  # tokens a row has room for
    num_sequences: int  # that a row may hold


class SampleIndex(NamedTuple):
    """Of each shard of one corpus."""

    num_samples: np.ndarray  # int64 [shards]
    marks: list[np.ndarray]  # uint32 [3 * M] each: token, sentence, document of each 64th sample


class Unusable(Exception):
    """Why a file is not the index that is looked for."""


def open_index(corpus: Corpus, walk: Walk, version: int) -> SampleIndex:
    """The index of a corpus; `version`: of the rules by which samples are cut."""
    if corpus.num_sentences < KEPT_FROM:
        return _walk(corpus, walk)
    key = hashlib.sha256(f"{corpus.fingerprint} {version} {walk}".encode()).digest()
    name = f"{walk.name}-{walk.width}.bin"
    folders = _folders(corpus)
    for folder in folders:
        try:
            return _read(folder / name, key, len(corpus.files))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except Unusable as error:
            _say(f"{folder / name} {error}; it is made anew")
    for folder in folders:
        if _can_write(folder):
            return _make(folder / name, key, corpus, walk)
    _say(f"no place for an index of {corpus.directory}: it is made again at each start")
    return _walk(corpus, walk)


def _folders(corpus: Corpus) -> list[Path]:
    """Where an index of the corpus may lie, best place first."""
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


def _make(path: Path, key: bytes, corpus: Corpus, walk: Walk) -> SampleIndex:
    """Write the index, unless another process has just done so, and map it."""
    with _only_one(path.with_name(path.name + ".lock")):
        with contextlib.suppress(FileNotFoundError, Unusable):
            return _read(path, key, len(corpus.files))
        _say(
            f"indexing the {corpus.num_sentences:,} sentences of {corpus.directory} for "
            f"{walk.name} of {walk.width} tokens; next time {path} is there"
        )
        _write(path, key, _walk(corpus, walk))
        return _read(path, key, len(corpus.files))


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here; a process that dies leaves."""
    with open(lock, "w") as file:
        files.lock(file, wait=True)
        yield


def _walk(corpus: Corpus, walk: Walk) -> SampleIndex:
    """Compiled code on several threads; tables are read, not mapped: in order, and not kept."""

    def one(shard: int) -> tuple[int, np.ndarray]:
        return index_shard(
            WALKS[walk.name], walk.width, walk.num_sequences, *corpus.files[shard].read_tables()
        )

    found = []
    last_line = time.monotonic()
    num_shards = len(corpus.files)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for result in pool.map(one, range(num_shards)):
            found.append(result)
            if time.monotonic() - last_line > _SECONDS_A_LINE:
                last_line = time.monotonic()
                _say(f"indexed {len(found):,} of {num_shards:,} shards")
    num_samples = np.array([num for num, _ in found], dtype=np.int64)
    return SampleIndex(num_samples, [marks.reshape(-1) for _, marks in found])


def _write(path: Path, key: bytes, index: SampleIndex) -> None:
    num_marks = np.array([len(marks) for marks in index.marks], dtype="<i8")
    body = [index.num_samples.astype("<i8"), num_marks, *(m.astype("<u4") for m in index.marks)]
    checksum = 0
    for array in body:
        checksum = zlib.crc32(array.data, checksum)
    with files.writing(path, shared=True) as file:
        file.write(_HEADER.pack(_MAGIC, key, checksum))
        for array in body:
            file.write(array.data)


def _read(path: Path, key: bytes, num_shards: int) -> SampleIndex:
    """The index in a file, mapped; FileNotFoundError, or Unusable with the reason."""
    with open(path, "rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise Unusable("is damaged or of another format")
        _, its_key, checksum = _HEADER.unpack(header)
        if its_key != key:
            raise Unusable("belongs to another state of the corpus")
        found = 0
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
        if found != checksum:
            raise Unusable("is damaged, as its checksum shows")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    num_samples, num_marks = np.frombuffer(data, "<i8", 2 * num_shards, _HEADER.size).reshape(2, -1)
    marks = np.frombuffer(data, "<u4", offset=_HEADER.size + 16 * num_shards)
    return SampleIndex(num_samples, np.split(marks, np.cumsum(num_marks)[:-1]))


def _say(line: str) -> None:
    print(f"sample index: {line}", file=sys.stderr, flush=True)
