"""What the compiled code of rows.py reads: where a corpus is mapped, where its samples begin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class MappedCorpus(NamedTuple):
    """The addresses and lengths of a corpus's arrays; each field has one entry per shard."""

    tokens: np.ndarray  # uint64: address of the tokens
    sentence_ends: np.ndarray  # uint64: address of the sentence ends
    document_ends: np.ndarray  # uint64: address of the document ends
    num_tokens: np.ndarray  # int64
    num_sentences: np.ndarray  # int64
    num_documents: np.ndarray  # int64


class Index(NamedTuple):
    """Where samples begin. Tokens, sentences and documents are counted from the shard's start."""

    first_samples: np.ndarray  # int64 [shards + 1]: samples before each shard, and in all
    marks: np.ndarray  # uint64 [shards]: address of sample_index.SampleIndex.marks of each
    like: np.ndarray  # uint32 [0]: the type of the marks, sentence ends and document ends


class Frame(NamedTuple):
    """What is added to text to make a row of it, and what its tokens lose."""

    cls_id: int
    sep_id: int
    id_mask: int  # the bits of a token that are its id


class Pieces(NamedTuple):
    """Which pieces of a corpus have been compared with their checksums (verification.Checks)."""

    first_pieces: np.ndarray  # int64 [shards + 1]: pieces before each shard, and in all
    is_compared: np.ndarray  # uint8 [pieces]
    has_tables_compared: np.ndarray  # uint8 [shards]
    piece_bytes: int
    first_token: int  # byte offset of a shard's tokens
    token_bytes: int
