"""`Samples`: what sample i of a corpus is, for each kind of samples.

Every token of the corpus is in exactly one sample of each kind:

    windows    S - 2 consecutive tokens, across sentences and documents; no padding
    sentences  as many whole consecutive sentences as fit, across documents
    documents  the same, but never across the end of a document: a long one gives several samples
    packed     several documents per row, each a [CLS] ... [SEP] of its own (cu_seqlens); one
               that fits into a row stays whole, a longer one is cut at sentence ends
    nsp, sop   a sample of `documents`, split in two at a sentence end, A and B. nsp, as in BERT: B
               is another document's text in half of the cases; sop, as in ALBERT: A and B are
               swapped in half of the cases

A sentence is cut only where it is longer than a row. No sample crosses a shard. For all kinds but
windows an index holds where samples begin (sample_index.py).

The exception is nsp: where it takes B from another document, the B that follows A in the text is
left out in that epoch. The other B comes from the same 4,096 samples of the shard, so it is near on
disk, and a shard that has a single document gives true pairs only. A sample of a single word has no
B and the label -100.

Rejected: BERT's 10% of shorter samples (a fixed share of the work would be padding), filling up a
packed row with half of a short document (this kind is there to keep its context whole).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import numpy as np

from clue_ds.data.checksums import PIECE_BYTES
from clue_ds.data.corpus import HEADER_BYTES, Corpus, ShardArrays
from clue_ds.data.sampling import Kind, PairKind
from clue_ds.data.stream import rows
from clue_ds.data.stream.first_use import missing_of_sequences, missing_of_windows
from clue_ds.data.stream.mixture import Mixture, corpora_of
from clue_ds.data.stream.sample_index import Walk, open_index
from clue_ds.data.stream.tables import Frame, Index, MappedCorpus, Pieces
from clue_ds.data.verification import Checks

KINDS: tuple[str, ...] = get_args(Kind)
PAIR_KINDS: tuple[str, ...] = get_args(PairKind)

# Raise it with any change after which the same corpus, seed and options give other batches.
# Checkpoints record it, and a run of another version is not resumed; indexes record it as well.
STREAM_VERSION = 1
# A packed row has room for one document per this many positions. cu_seqlens has an entry for each,
# used or not, and documents that are shorter than this on average are rare.
POSITIONS_A_SEQUENCE = 8


class Rows(NamedTuple):
    """The unmasked rows of a batch, and the further entries that a kind adds to the batch."""

    tokens: np.ndarray  # uint16 or uint32 [B, S]: marked tokens, [CLS] and [SEP]; not padded
    lengths: np.ndarray  # int64 [B]
    extras: dict[str, np.ndarray]  # further entries, see SampleStream.batch


class Samples:
    """The samples of a corpus: `num_samples`, numbered along the text."""

    def __init__(
        self, corpus: Corpus | Mixture, kind: Kind, seq_length: int, cls_id: int, sep_id: int
    ) -> None:
        self.kind, self.seq_length = kind, seq_length
        self._shards = corpus.shards  # the maps must outlive the addresses
        self._dtype = corpus.shards[0].tokens.dtype
        self._mapped = _mapped_corpus(corpus.shards)
        id_mask = (1 << (8 * self._dtype.itemsize - 1)) - 1
        self._frame = Frame(cls_id, sep_id, id_mask)
        self.checks = Checks(corpora_of(corpus))
        self._pieces = Pieces(
            self.checks.first_pieces,
            self.checks.is_compared,
            self.checks.has_tables_compared,
            PIECE_BYTES,
            HEADER_BYTES,
            self._dtype.itemsize,
        )
        self._num_sequences = 1
        if kind == "windows":
            self._firsts = _cumulative(-(-self._mapped.num_tokens // (seq_length - 2)))
        else:
            if kind == "packed":
                self._num_sequences = max(1, seq_length // POSITIONS_A_SEQUENCE)
            self._index = self._open_index(corpora_of(corpus))
            self._firsts = self._index.first_samples
        self.num_samples = int(self._firsts[-1])
        num_shards = np.cumsum([0, *(len(one.shards) for one in corpora_of(corpus))])
        self.samples_per_corpus = np.diff(self._firsts[num_shards])  # int64 [corpora of a mixture]

    def _open_index(self, corpora: list[Corpus]) -> Index:
        own = {"sentences": "sentences", "packed": "packed"}
        name = own.get(self.kind, "documents")  # nsp and sop split samples of documents
        self._walk = rows.WALKS[name]
        specials = {"packed": 0, "nsp": 3, "sop": 3}.get(self.kind, 2)
        walk = Walk(name, self.seq_length - specials, self._num_sequences)
        found = [open_index(corpus, walk, STREAM_VERSION, self.checks) for corpus in corpora]
        self._marks = [marks for index in found for marks in index.marks]
        return Index(
            _cumulative(np.concatenate([index.num_samples for index in found])),
            _addresses(self._marks),
            np.empty(0, np.uint32),
        )

    def token_runs(self, first_sample: int, end_sample: int) -> Iterator[tuple[int, int, int]]:
        """The tokens of samples first_sample .. end_sample - 1: (shard, begin, end) of each run.

        For all kinds but windows a run is extended to places that the index knows: it begins up to
        63 samples earlier and ends up to 63 samples later.
        """
        shard = int(np.searchsorted(self._firsts, first_sample, side="right")) - 1
        while first_sample < end_sample:
            base, limit = self._firsts[shard : shard + 2].tolist()
            begin, end = first_sample - base, min(end_sample, limit) - base
            if begin < end:
                yield shard, self._token_at(shard, begin), self._token_at(shard, end, behind=True)
            first_sample = base + end
            shard += 1

    def _token_at(self, shard: int, place: int, behind: bool = False) -> int:
        """The token at which a sample of a shard begins, or the next place in the index.

        That is the last one before the sample, or, with `behind`, the first one behind it.
        """
        num_tokens = int(self._mapped.num_tokens[shard])
        if self.kind == "windows":
            return min(place * (self.seq_length - 2), num_tokens)
        mark = -(-place // rows.STRIDE) if behind else place // rows.STRIDE
        if mark * rows.STRIDE >= self._firsts[shard + 1] - self._firsts[shard]:
            return num_tokens
        return int(self._marks[shard][3 * mark])

    def rows(self, samples: np.ndarray, epochs: np.ndarray, pair_key: np.uint64) -> Rows:
        """The rows of `samples` in `epochs`, uint64 [B]; the key decides how pairs are made."""
        if not self.checks.is_complete:
            self._compare(samples)
        shape = (len(samples), self.seq_length)
        tokens = np.empty(shape, self._dtype)
        lengths = np.empty(len(samples), np.int64)
        extras: dict[str, Any] = {}
        to = (self._frame, tokens, lengths)
        if self.kind == "windows":
            rows.fill_windows(samples, self._mapped, self._firsts, *to)
        elif self.kind in PAIR_KINDS:
            extras["token_type_ids"] = np.empty(shape, np.int64)
            extras["next_sentence_label"] = np.empty(len(samples), np.int64)
            rows.fill_pairs(
                samples,
                epochs,
                pair_key,
                self.kind == "sop",
                self._mapped,
                self._index,
                *to,
                *extras.values(),
            )
        else:
            cu_seqlens = np.empty((len(samples), self._num_sequences + 1), np.int64)
            rows.fill_sequences(self._walk, samples, self._mapped, self._index, *to, cu_seqlens)
            if self.kind == "packed":
                extras["cu_seqlens"] = cu_seqlens
        return Rows(tokens, lengths, extras)

    def _compare(self, samples: np.ndarray) -> None:
        """Compare what these samples read with its checksums, unless this process did already."""
        num_tokens = self._mapped.num_tokens
        if self.kind == "windows":
            window = self.seq_length - 2
            missing = missing_of_windows(samples, self._firsts, num_tokens, window, self._pieces)
        else:
            reach = rows.PARTNER_WINDOW if self.kind == "nsp" else rows.STRIDE
            missing = missing_of_sequences(
                samples, self._index, num_tokens, rows.STRIDE, reach, self._pieces
            )
        if len(missing):
            self.checks.compare_pieces(missing)
            if self.kind != "windows":
                shards = np.searchsorted(self._firsts, samples.astype(np.int64), side="right") - 1
                self.checks.has_tables_compared[shards] = 1


def _cumulative(counts: Any) -> np.ndarray:
    """[0, counts[0], counts[0] + counts[1], ...], int64."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _addresses(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


def _mapped_corpus(shards: list[ShardArrays]) -> MappedCorpus:
    def lengths(arrays: list[np.ndarray]) -> np.ndarray:
        return np.array([len(array) for array in arrays], dtype=np.int64)

    sections = [list(section) for section in zip(*shards, strict=True)]
    return MappedCorpus(*map(_addresses, sections), *map(lengths, sections))
