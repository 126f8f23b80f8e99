"""What a worker does: it converts a chunk to shards on disk, and drops duplicates from shards.

A chunk has two sides: a shard for training, and a shard of held-out documents if there are any.
The functions here get everything as arguments, so any process can run them. What `convert_chunk`
and `drop_duplicates` return is the JSON record that the staging area keeps of a finished chunk.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from clue_ds import files
from clue_ds.data.build import clean, dedup
from clue_ds.data.build.convert import Converter, add_samples, is_held_out
from clue_ds.data.build.options import (
    DUPLICATE,
    KEPT,
    NEAR_DUPLICATE,
    REASONS,
    Cleaning,
    ConvertOptions,
)
from clue_ds.data.checksums import PieceChecksums
from clue_ds.data.corpus import (
    HELD_OUT,
    STATE_DIRECTORY,
    ShardArrays,
    map_shard,
    shard_name,
    write_shard,
)
from clue_ds.data.text.decode import Tally
from clue_ds.data.text.inputs import Segment, chunk_hash

# Converted shards are kept here until it is known which documents are duplicates.
WAITING = Path(STATE_DIRECTORY) / "waiting"


@functools.lru_cache(maxsize=1)
def converter(vocab_file: str, options: ConvertOptions) -> Converter:
    """The converter of this process, made on first use."""
    return Converter(vocab_file, options)


def prepare(vocab_file: str, options: ConvertOptions) -> None:
    """Convert one line before any chunk is converted.

    A bad vocabulary is then one error, not one per worker, and compiled code is in the disk cache
    when the workers need it.
    """
    converter(vocab_file, options).convert([Segment("text", "", 0, "暖身\n".encode())])


def _keys_file(output: Path, index: int) -> Path:
    """The file that keeps the hashes and keys of chunk `index` until duplicates are dropped."""
    return output / STATE_DIRECTORY / f"keys-{index:06d}.npy"


def convert_chunk(
    output: Path, vocab_file: str, options: ConvertOptions, index: int, chunk: list[Segment]
) -> dict[str, Any]:
    """Convert chunk `index`, which empties it, write its shards, and return its record."""
    worker = converter(vocab_file, options)
    input_sha256 = chunk_hash(chunk)
    converted = worker.convert(chunk)
    directory = output
    if options.clean.compares_documents:
        directory = output / WAITING
        (directory / HELD_OUT).mkdir(parents=True, exist_ok=True)
        rows = [converted.hashes[np.newaxis], converted.keys][: 1 + bool(converted.keys.size)]
        with files.writing(_keys_file(output, index)) as file:
            np.save(file, np.concatenate(rows))
    sides = (directory, converted.training), (directory / HELD_OUT, converted.held_out)
    return {
        "input_sha256": input_sha256,
        "sides": [_write_side(path, index, arrays, worker) for path, arrays in sides],
        "tally": converted.tally.as_dict(),
        "seconds": converted.seconds,
    }


def _write_side(
    directory: Path, index: int, arrays: ShardArrays, worker: Converter
) -> dict[str, Any] | None:
    """Write one shard and return its record; None, and no file, if it would hold no token."""
    if not len(arrays.tokens):
        return None
    directory.mkdir(exist_ok=True)
    tokenizer = worker.tokenizer
    ids = arrays.tokens & (tokenizer.continues - 1)
    document_ends = np.asarray(arrays.sentence_ends)[np.asarray(arrays.document_ends) - 1]
    pieces = PieceChecksums()
    record = write_shard(directory / shard_name(index), arrays, pieces)
    return {
        "shard": record._asdict(),
        "checksums": pieces.result().astype("<u8").tobytes().hex(),
        "max_token_id": int(ids.max()),
        "num_unknown": int((ids == tokenizer.unk_id).sum()),
        "sentence_tokens": _histogram(arrays.sentence_ends),
        "document_tokens": _histogram(document_ends),
    }


def _histogram(ends: np.ndarray) -> dict[str, int]:
    """Numbers of lengths by the power of two (1, 2, 4, ...) that they are at most."""
    lengths = np.diff(np.asarray(ends, dtype=np.int64), prepend=0)
    powers = np.ceil(np.log2(lengths)).astype(np.int64)
    return {str(1 << power): n for power, n in enumerate(np.bincount(powers).tolist()) if n}


def find_duplicates(output: Path, num_chunks: int, cleaning: Cleaning) -> None:
    """Write files that say which documents of which chunk are duplicates."""
    dedup.find_duplicates([_keys_file(output, i) for i in range(num_chunks)], cleaning)


def drop_duplicates(
    output: Path,
    vocab_file: str,
    options: ConvertOptions,
    index: int,
    sides: list[dict[str, Any] | None],
) -> dict[str, Any]:
    """Put the shards of chunk `index` into the corpus without its duplicates; return its record.

    After a kill it can simply be called again: a waiting shard is either moved into the corpus or
    stays until the staging area is removed.
    """
    worker = converter(vocab_file, options)
    reasons = dedup.reasons_beside(_keys_file(output, index))
    aside = is_held_out(np.load(_keys_file(output, index))[0], options.held_out)
    tally = Tally(Counter())
    written: list[dict[str, Any] | None] = []
    for side, directory in enumerate(("", HELD_OUT)):
        record = sides[side]
        of_side = reasons[aside == bool(side)]
        waiting = output / WAITING / directory / shard_name(index)
        if record is None or not of_side.any():
            if record is not None and waiting.exists():
                (output / directory).mkdir(exist_ok=True)
                os.replace(waiting, output / directory / shard_name(index))
            written.append(record)
            continue
        arrays = map_shard(waiting).arrays
        num_sentences: np.ndarray = np.diff(arrays.document_ends.astype(np.int64), prepend=0)
        first = np.cumsum(num_sentences) - num_sentences
        for code in (DUPLICATE, NEAR_DUPLICATE):
            reason, dropped = REASONS[code], of_side == code
            tally.counts[f"lines_{reason}"] += int(num_sentences[dropped].sum())
            tally.counts[f"documents_{reason}"] += int(dropped.sum())
            add_samples(worker.tokenizer, arrays, first[dropped], reason, tally)
        kept = clean.take(arrays, np.repeat(of_side == KEPT, num_sentences))
        written.append(_write_side(output / directory, index, kept, worker))
    return {"sides": written, "tally": tally.as_dict()}
