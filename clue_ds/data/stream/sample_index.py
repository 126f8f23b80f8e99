"""Where samples begin: found by one walk over a corpus's tables, then kept in a small file.

All kinds but windows follow sentence and document ends, so the place of sample i depends on all
samples before it in its shard. `open_index` walks over the tables once (some 4 ns per sentence) and
keeps the place of every 64th sample, its mark. For a corpus of KEPT_FROM sentences or more it saves
the marks in a file, 12 bytes per 64 samples, and later starts map that file.

Guarantees: the corpus's directory is not touched. The file is beside it, in NAME.index/, or in the
user's cache (XDG_CACHE_HOME) where NAME.index/ can't be written or would be inside another corpus
(held_out). It records what it was made of and a checksum of all its bytes: a file that is stale,
cut off or changed is made again, with a line on stderr. It appears under its name complete or not
at all. Of processes that start together one makes it while the others wait (flock; on a file system
without locks each of them makes it, with the same bytes).

Rejected: marks in the corpus itself, made by `clue-ds shard` (it doesn't know lengths and kinds);
a mark for each sample (64 times the size, to save a walk over 32 samples per row).
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

# A walk over this many sentences takes as long as importing numba.
KEPT_FROM = 1 << 24
MAX_THREADS = 8
_SECONDS_A_LINE = 10.0
# magic with format version, SHA-256 of what it is an index of, CRC-32 of the rest.
_HEADER = struct.Struct("<8s32sQ")
_MAGIC = b"CLUE-IX\x01"


class Walk(NamedTuple):
    """How a corpus is cut into samples: the parameters of rows.index_shard."""

    name: str  # a key of rows.WALKS
    width: int  # tokens that a row has room for
    num_sequences: int  # sequences that a row may hold


class SampleIndex(NamedTuple):
    """Where the samples of one corpus begin, by shard."""

    num_samples: np.ndarray  # int64 [shards]
    marks: list[np.ndarray]  # uint32 [3 * M] each: token, sentence, document of each 64th sample


class Unusable(Exception):
    """A file is not the index that was looked for; the message is the reason."""


def open_index(corpus: Corpus, walk: Walk, version: int) -> SampleIndex:
    """The index of a corpus; `version` is that of the rules by which samples are cut."""
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
            _say(f"{folder / name} {error}; it is made again")
    for folder in folders:
        if _can_write(folder):
            return _make(folder / name, key, corpus, walk)
    _say(f"an index of {corpus.directory} can't be saved: it is made again at each start")
    return _walk(corpus, walk)


def _folders(corpus: Corpus) -> list[Path]:
    """The folders in which an index of the corpus may be, best one first."""
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
            f"{walk.name} of {walk.width} tokens; later starts read {path}"
        )
        _write(path, key, _walk(corpus, walk))
        return _read(path, key, len(corpus.files))


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold the lock of an index while the block runs; it is released when its process ends."""
    with open(lock, "w") as file:
        files.lock(file, wait=True)
        yield


def _walk(corpus: Corpus, walk: Walk) -> SampleIndex:
    """Make an index with compiled code on several threads.

    Sentence and document ends are read from the files, not through the map: one shard after the
    other, and without staying in the process's memory.
    """

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
    """The index in a file, mapped. Raises FileNotFoundError, or Unusable with the reason."""
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
