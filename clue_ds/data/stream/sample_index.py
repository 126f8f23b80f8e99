"""Where samples begin: found by one walk over a corpus's tables, then kept in a small file.

All kinds but windows follow sentence and document ends, so the place of sample i depends on all
samples before it in its shard. `open_index` walks over the tables once (some 4 ns per sentence) and
keeps the place of every 64th sample, its mark. For a corpus of KEPT_FROM sentences or more it saves
the marks in a file, 12 bytes per 64 samples, and later starts map that file (derived.py).

Rejected: marks in the corpus itself, made by `clue-ds shard` (it doesn't know lengths and kinds);
a mark for each sample (64 times the size, to save a walk over 32 samples per row).
"""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clue_ds.data.corpus import Corpus
from clue_ds.data.derived import DerivedFile, open_derived, say
from clue_ds.data.stream.rows import WALKS, index_shard
from clue_ds.data.verification import Checks

# A walk over this many sentences takes as long as importing numba.
KEPT_FROM = 1 << 24
MAX_THREADS = 8
_SECONDS_A_LINE = 10.0
# Version 1 was made of tables that nobody had checked.
_MAGIC = b"CLUE-IX\x02"


class Walk(NamedTuple):
    """How a corpus is cut into samples: the parameters of rows.index_shard."""

    name: str  # a key of rows.WALKS
    width: int  # tokens that a row has room for
    num_sequences: int  # sequences that a row may hold


class SampleIndex(NamedTuple):
    """Where the samples of one corpus begin, by shard."""

    num_samples: np.ndarray  # int64 [shards]
    marks: list[np.ndarray]  # uint32 [3 * M] each: token, sentence, document of each 64th sample


def open_index(corpus: Corpus, walk: Walk, version: int, checks: Checks) -> SampleIndex:
    """The index of a corpus; `version` is that of the rules by which samples are cut."""
    key = hashlib.sha256(f"{corpus.fingerprint} {version} {walk}".encode()).digest()
    file = DerivedFile(f"{walk.name}-{walk.width}.bin", _MAGIC, key, "sample index")
    if corpus.num_sentences < KEPT_FROM:
        return _walk(corpus, walk, file, checks)

    def make(path: Path | None) -> list[np.ndarray]:
        if path is not None:
            say(
                file,
                f"indexing the {corpus.num_sentences:,} sentences of {corpus.directory} for "
                f"{walk.name} of {walk.width} tokens; later starts read {path}",
            )
        index = _walk(corpus, walk, file, checks)
        num_marks = np.array([len(marks) for marks in index.marks], dtype="<i8")
        marks = (one.astype("<u4") for one in index.marks)
        return [index.num_samples.astype("<i8"), num_marks, *marks]

    body = open_derived(corpus, file, make)
    num_shards = len(corpus.files)
    num_samples, num_marks = body[: 16 * num_shards].view("<i8").reshape(2, -1)
    marks = body[16 * num_shards :].view("<u4")
    return SampleIndex(num_samples, np.split(marks, np.cumsum(num_marks)[:-1]))


def _walk(corpus: Corpus, walk: Walk, file: DerivedFile, checks: Checks) -> SampleIndex:
    """Make an index with compiled code on several threads.

    Sentence and document ends are read from the files, not through the map: one shard after the
    other, and without staying in the process's memory.
    """

    def one(shard: int) -> tuple[int, np.ndarray]:
        opened = corpus.files[shard]
        checks.compare_tables(opened)
        return index_shard(WALKS[walk.name], walk.width, walk.num_sequences, *opened.read_tables())

    found = []
    last_line = time.monotonic()
    num_shards = len(corpus.files)
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for result in pool.map(one, range(num_shards)):
            found.append(result)
            if time.monotonic() - last_line > _SECONDS_A_LINE:
                last_line = time.monotonic()
                say(file, f"indexed {len(found):,} of {num_shards:,} shards")
    num_samples = np.array([num for num, _ in found], dtype=np.int64)
    return SampleIndex(num_samples, [marks.reshape(-1) for _, marks in found])
