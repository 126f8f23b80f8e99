"""What spans.py's compiled code reads: where a corpus is mapped, and where its samples begin."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """A corpus as compiled code sees it; each array has an entry a shard."""

    tokens: np.ndarray  # uint64: where the tokens are mapped
    sentence_ends: np.ndarray  # uint64: where the sentence ends are mapped
    document_ends: np.ndarray  # uint64: where the document ends are mapped
    num_tokens: np.ndarray  # int64
    num_sentences: np.ndarray  # int64
    num_documents: np.ndarray  # int64


class Index(NamedTuple):
    """Where samples begin. Tokens, sentences and documents are counted from the shard's start."""

    first_samples: np.ndarray  # int64 [shards + 1]: samples before each shard, and in all
    marks: np.ndarray  # uint64 [shards]: where sample_index.SampleIndex.marks of each lie
    entry: np.ndarray  # uint32 [0]: of that type are all tables that are mapped


class Frame(NamedTuple):
    """What a row is put together with."""

    cls_id: int
    sep_id: int
    id_mask: int  # the bits of a token that are its id
