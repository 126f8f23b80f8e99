"""Synthetic corpora of any size for benchmarks, in the real format.

Tokens are ordinary ids made by hashing; two of five continue a word. Sentences of 1 to 160 tokens
(40 on average) and documents of 1 to 60 sentences repeat in cycles. Sections of a shard that are
not written are holes of the file, which take no disk space and read as zeros. The bytes are the
same on any machine. Only `Corpus.verify` sees a difference from a real corpus: the SHA-256 in
corpus.json are not those of the shards.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clue_ds import files
from clue_ds.data.checksums import PIECE_BYTES, checksums, num_pieces, write_checksums
from clue_ds.data.corpus import (
    ALIGNMENT,
    FORMAT_VERSION,
    MANIFEST,
    VOCAB_FILE,
    ShardRecord,
    fingerprint,
    manifest_checksum,
    shard_header,
    shard_name,
)
from clue_ds.vocab_file import SPECIAL_TOKENS

VOCAB_SIZE = 21_128
SENTENCES = np.array([9, 18, 27, 31, 36, 45, 160, 1, 33])  # tokens of each, over and over
DOCUMENTS = np.array([1, 12, 3, 60, 24, 2])  # sentences of each, over and over
BEGINS_SENTENCE = np.bincount(np.cumsum(SENTENCES) - SENTENCES, minlength=SENTENCES.sum()) > 0
_AT_ONCE = 1 << 22
_CONTINUES = 1 << 15

Holes = Literal["nothing", "tokens", "everything"]


def write_corpus(directory: Path, num_tokens: int, num_shards: int, holes: Holes) -> None:
    """Write a corpus of num_tokens tokens of 2 bytes in num_shards shards, with the given holes."""
    directory.mkdir(parents=True)
    ordinary = (f"token{i}" for i in range(VOCAB_SIZE - len(SPECIAL_TOKENS)))
    vocab = directory / VOCAB_FILE
    vocab.write_text("\n".join([*SPECIAL_TOKENS, *ordinary]) + "\n")
    bounds = np.linspace(0, num_tokens, num_shards + 1).astype(np.int64)
    records = [
        _write_shard(directory / shard_name(index), index, tokens, holes)
        for index, tokens in enumerate(np.diff(bounds).tolist())
    ]
    manifest: dict[str, Any] = {
        "format": "clue_ds corpus",
        "version": FORMAT_VERSION,
        "vocab_sha256": files.sha256(vocab),
        "vocab_size": VOCAB_SIZE,
        "token_bytes": 2,
        "num_tokens": num_tokens,
        "num_sentences": sum(record.num_sentences for record in records),
        "num_documents": sum(record.num_documents for record in records),
        "options": {"lower_case": True},
        "shards": [record._asdict() for record in records],
    }
    manifest["fingerprint"] = fingerprint(manifest)
    sums = [_checksums(directory / record.file) for record in records]
    write_checksums(directory, manifest["fingerprint"], sums)
    files.write_json(directory / MANIFEST, {**manifest, "checksum": manifest_checksum(manifest)})


def _checksums(path: Path) -> np.ndarray:
    """The checksums of a shard; its holes are not read: zeros have the checksum 0."""
    size = path.stat().st_size
    sums = np.zeros(num_pieces(size), np.uint64)
    with open(path, "rb", buffering=0) as file:
        end = 0
        while end < size:
            try:
                written = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    break
                raise
            begin = written // PIECE_BYTES * PIECE_BYTES
            hole = os.lseek(file.fileno(), written, os.SEEK_HOLE)
            end = min(size, begin + _AT_ONCE, -(-hole // PIECE_BYTES) * PIECE_BYTES)
            data = np.fromfile(path, np.uint8, end - begin, offset=begin)
            first = begin // PIECE_BYTES
            sums[first : first + num_pieces(len(data))] = checksums(data)
    return sums


def _write_shard(path: Path, index: int, num_tokens: int, holes: Holes) -> ShardRecord:
    num_sentences = _num_groups(num_tokens, SENTENCES)
    num_documents = _num_groups(num_sentences, DOCUMENTS)
    header, size = shard_header(2, num_tokens, num_sentences, num_documents)
    with open(path, "wb") as file:
        file.write(header)
        if holes == "nothing":
            for begin in range(0, num_tokens, _AT_ONCE):
                file.write(_tokens(index, begin, min(begin + _AT_ONCE, num_tokens)).data)
        file.truncate(size)
        # The last ends, which `Corpus` compares, are there in any case.
        documents = size - 4 * num_documents
        sentences = (documents - 4 * num_sentences) // ALIGNMENT * ALIGNMENT
        for behind, last in ((sentences + 4 * num_sentences, num_tokens), (size, num_sentences)):
            file.seek(behind - 4)
            file.write(last.to_bytes(4, "little"))
        if holes != "everything":
            file.seek(documents)
            file.write(_ends(DOCUMENTS, num_documents, num_sentences).data)
            file.seek(sentences)
            file.write(_ends(SENTENCES, num_sentences, num_tokens).data)
    digest = hashlib.sha256(header + str(index).encode()).hexdigest()
    return ShardRecord(path.name, num_tokens, num_sentences, num_documents, size, digest)


def _num_groups(num: int, cycle: np.ndarray) -> int:
    """Number of groups with the sizes of `cycle` that hold `num` items; the last may be partial."""
    rest = num % cycle.sum()
    return int(
        num // cycle.sum() * len(cycle) + np.searchsorted(np.cumsum(cycle), rest) + (rest > 0)
    )


def _ends(cycle: np.ndarray, num_groups: int, num: int) -> np.ndarray:
    """uint32 [num_groups]: where each group ends."""
    sizes = np.resize(cycle, num_groups)
    return np.minimum(np.cumsum(sizes), num).astype("<u4")


def _tokens(shard: int, begin: int, end: int) -> np.ndarray:
    """uint16 [end - begin]: tokens begin .. end - 1 of a shard, made by hashing their positions."""
    places = np.arange(begin, end, dtype=np.uint64)
    hashes = (places + np.uint64(shard << 40)) * np.uint64(0x9E3779B97F4A7C15)
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)
    num_ordinary = np.uint64(VOCAB_SIZE - len(SPECIAL_TOKENS))
    ids = (hashes % num_ordinary).astype(np.uint16) + np.uint16(len(SPECIAL_TOKENS))
    continues = (hashes >> np.uint64(16)) % np.uint64(5) < 2
    continues &= ~BEGINS_SENTENCE[places % np.uint64(len(BEGINS_SENTENCE))]
    return ids | np.where(continues, np.uint16(_CONTINUES), np.uint16(0))
