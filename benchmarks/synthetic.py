"""Corpora of any size for benchmarks, in the real format and without any text.

Sparse ones take no disk: the tokens are holes, which read as zeros. Others hold random ordinary
ids. Only `Corpus.verify` can tell: the checksums in corpus.json are not those of the shards.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from clue_ds.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    VOCAB_FILE,
    ShardRecord,
    fingerprint,
    shard_header,
    shard_name,
    write_json,
)
from clue_ds.data.vocab import SPECIAL_TOKENS, vocab_sha256

VOCAB_SIZE = 21_128
TOKENS_PER_SENTENCE = 32
SENTENCES_PER_DOCUMENT = 32


def write_corpus(directory: Path, num_tokens: int, num_shards: int, sparse: bool) -> None:
    """A corpus of num_tokens tokens of 2 bytes in num_shards shards."""
    directory.mkdir(parents=True)
    ordinary = (f"token{i}" for i in range(VOCAB_SIZE - len(SPECIAL_TOKENS)))
    vocab = directory / VOCAB_FILE
    vocab.write_text("\n".join([*SPECIAL_TOKENS, *ordinary]) + "\n")
    bounds = np.linspace(0, num_tokens, num_shards + 1).astype(np.int64)
    rng = np.random.default_rng(0)
    records = []
    for index, tokens in enumerate(np.diff(bounds).tolist()):
        sentences = -(-tokens // TOKENS_PER_SENTENCE)
        documents = -(-sentences // SENTENCES_PER_DOCUMENT)
        header, size = shard_header(2, tokens, sentences, documents)
        path = directory / shard_name(index)
        with open(path, "wb") as file:
            file.write(header)
            if not sparse:
                for begin in range(0, tokens, 1 << 24):
                    num = min(1 << 24, tokens - begin)
                    file.write(rng.integers(5, VOCAB_SIZE, num, dtype=np.uint16).tobytes())
            file.truncate(size)
        digest = hashlib.sha256(header + str(index).encode()).hexdigest()
        records.append(ShardRecord(path.name, tokens, sentences, documents, size, digest))
    manifest = {
        "format": "clue_ds corpus",
        "version": FORMAT_VERSION,
        "vocab_sha256": vocab_sha256(vocab),
        "vocab_size": VOCAB_SIZE,
        "token_bytes": 2,
        "num_tokens": num_tokens,
        "num_sentences": sum(record.num_sentences for record in records),
        "num_documents": sum(record.num_documents for record in records),
        "options": {"lower_case": True},
        "shards": [record._asdict() for record in records],
    }
    write_json(directory / MANIFEST, {**manifest, "fingerprint": fingerprint(manifest)})
