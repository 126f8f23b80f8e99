"""`LabelledPairs`: labelled sentence pairs from JSON lines, in memory, as samples of a stream.

A line is {"sentence1": ..., "sentence2": ..., "label": ...}, as NLI and similarity sets of CLUE are
published. Files with equal sets of labels share them (CMNLI and OCNLI); different sets are kept
apart, even where a label of one has the name of a label of another. Label i of the stream is row i
of one table of (set, name). A pair labelled "-" (its annotators did not agree) is skipped and
counted.

A sample is [CLS] sentence1 [SEP] sentence2 [SEP]; while it is too long, the longer sentence loses
its last token. Every pair comes exactly once per epoch, whatever file it is from. Such sets have
under a million pairs, and a pair takes some 100 bytes, so they are held in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clue_ds import files, vocab_file
from clue_ds.data.corpus import MANIFEST, VOCAB_FILE, Corpus
from clue_ds.data.jit import compiled
from clue_ds.data.stream.samples import Rows
from clue_ds.data.stream.tables import Frame
from clue_ds.data.text.formats.json_records import read_records
from clue_ds.data.text.sources import matches
from clue_ds.data.text.tokenizer import Tokenizer
from clue_ds.data.text.words import mark_words, word_lengths
from clue_ds.errors import UserError, existing_file

FIELDS = ("sentence1", "sentence2", "label")
NO_LABEL = "-"


class Pair(NamedTuple):
    """One line of a file."""

    sentence1: str
    sentence2: str
    label: str


class LabelledPairs:
    """Pairs of some files, tokenized with the vocabulary in `directory` (a corpus or a model).

    `labels[i]` is (set, name) of label i, and `num_skipped` counts pairs labelled "-". Raises a
    UserError that names file and line for a line that is not a pair, and one that names the file
    when `labels` are given and no set of them has all labels of the file.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        directory: str | Path,
        labels: list[tuple[int, str]] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.vocab_file = self.directory / VOCAB_FILE
        if not self.vocab_file.is_file():
            raise UserError(f"{self.directory} has no {VOCAB_FILE}; give a corpus or a model")
        self.vocab_sha256 = files.sha256(self.vocab_file)
        self.lower_case = _lower_case(self.directory)
        self._tokenizer = Tokenizer(self.vocab_file, self.lower_case)
        self.vocab_size = self._tokenizer.vocab_size
        self.token_dtype = np.dtype(self._tokenizer.dtype)
        by_file = {path: list(_read(path)) for path in _expand(paths)}
        pairs = [pair for group in by_file.values() for pair in group if pair.label != NO_LABEL]
        self.num_skipped = sum(len(group) for group in by_file.values()) - len(pairs)
        if not pairs:
            raise UserError(f"{', '.join(paths)}: there is no labelled pair in these files")
        self.labels = labels or _label_sets(by_file)
        self.targets = _targets(by_file, self.labels)
        self.num_documents = len(pairs)
        self._tokens, lengths = self._encode([s for pair in pairs for s in pair[:2]])
        self._ends = np.cumsum(lengths)
        self.num_tokens = int(self._ends[-1])
        digest = hashlib.sha256(self._tokens.tobytes() + self._ends.tobytes())
        digest.update(json.dumps([self.labels, self.targets.tolist()]).encode())
        self.fingerprint = digest.hexdigest()

    @property
    def label_sets(self) -> list[int]:
        """The set of each label."""
        return [number for number, _ in self.labels]

    @property
    def majority(self) -> float:
        """The accuracy of always predicting the most frequent label of each set."""
        counts = np.bincount(self.targets, minlength=len(self.labels))
        sets = np.array(self.label_sets)
        return sum(counts[sets == number].max() for number in set(sets.tolist())) / counts.sum()

    def _encode(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        text = "\n".join(" ".join(sentence.splitlines()) for sentence in sentences) + "\n"
        tokens, starts, lengths = self._tokenizer.encode_marked(text.encode())
        mark_words(tokens, starts, lengths, word_lengths(text, "rjieba"), self._tokenizer.continues)
        return tokens, lengths

    def samples(self, seq_length: int) -> PairSamples:
        """The pairs as samples for a SampleStream."""
        tokenizer = self._tokenizer
        frame = Frame(tokenizer.cls_id, tokenizer.sep_id, tokenizer.continues - 1)
        return PairSamples(self._tokens, self._ends, self.targets, seq_length, frame)


class PairSamples:
    """Labelled pairs with the interface of Samples; each pair is a sample."""

    def __init__(
        self,
        tokens: np.ndarray,
        ends: np.ndarray,
        targets: np.ndarray,
        seq_length: int,
        frame: Frame,
    ) -> None:
        self.num_samples = len(targets)
        self.samples_per_corpus = np.array([len(targets)])
        self._tokens, self._ends, self._targets = tokens, ends, targets
        self._seq_length, self._frame = seq_length, frame

    def rows(self, samples: np.ndarray, epochs: np.ndarray, pair_key: np.uint64) -> Rows:
        """The rows of `samples` uint64 [B]: the same in each epoch, only their masks change."""
        shape = (len(samples), self._seq_length)
        tokens = np.empty(shape, self._tokens.dtype)
        types, lengths = np.empty(shape, np.int64), np.empty(len(samples), np.int64)
        _fill(samples, self._tokens, self._ends, self._frame, tokens, lengths, types)
        labels = self._targets[samples.astype(np.int64)]
        return Rows(tokens, lengths, {"token_type_ids": types, "next_sentence_label": labels})


@compiled
def _fill(
    samples: np.ndarray,
    tokens: np.ndarray,
    sentence_ends: np.ndarray,
    frame: Frame,
    rows: np.ndarray,
    lengths: np.ndarray,
    token_type_ids: np.ndarray,
) -> None:
    """Rows [B, S] as rows.fill_pairs writes them, of sentences 2 i and 2 i + 1 for sample i."""
    room = rows.shape[1] - 3
    for b in range(rows.shape[0]):
        first = 2 * np.int64(samples[b])
        begin = sentence_ends[first - 1] if first else np.int64(0)
        middle, end = sentence_ends[first], sentence_ends[first + 1]
        a, other = middle - begin, end - middle
        # The same lengths as taking one token at a time from the longer sentence.
        if a + other > room:
            shorter = min(a, other, room // 2)
            a, other = (shorter, room - shorter) if a < other else (room - shorter, shorter)
        rows[b, 0] = frame.cls_id
        for i in range(a):
            rows[b, 1 + i] = tokens[begin + i]
        rows[b, 1 + a] = frame.sep_id
        for i in range(other):
            rows[b, 2 + a + i] = tokens[middle + i]
        length = a + other + 3
        rows[b, length - 1] = frame.sep_id
        lengths[b] = length
        token_type_ids[b, : 2 + a] = 0
        token_type_ids[b, 2 + a : length] = 1
        token_type_ids[b, length:] = 0


def _lower_case(directory: Path) -> bool:
    if (directory / MANIFEST).is_file():
        return Corpus(directory).lower_case
    return vocab_file.lower_case(directory / "vocab.txt")


def _expand(patterns: tuple[str, ...]) -> list[str]:
    paths = []
    for pattern in patterns:
        found = matches(pattern)
        if not found:
            raise UserError(f"there is no file {pattern}; give files of pairs, or globs")
        paths += found
    return paths


def _read(path: str) -> Iterator[Pair]:
    """The pairs of one file; a mistake in it is a UserError with file and line."""
    for number, record in read_records(existing_file(path, "file of pairs")):
        where = f"{path}, line {number}"
        if not isinstance(record, dict) or not record.keys() >= set(FIELDS):
            raise UserError(
                f"{where} lacks one of the fields {', '.join(FIELDS)}; add it, or leave the line "
                "out"
            )
        yield Pair(*(_text(record[name], name, where) for name in FIELDS))


def _text(value: object, name: str, where: str) -> str:
    """The text of a field, which may be a number, as labels are in some sets."""
    if value is None or isinstance(value, (dict, list)):
        kind = "null" if value is None else "an object" if isinstance(value, dict) else "a list"
        raise UserError(f"{where}: {name} is {kind}, not text; correct it, or leave the line out")
    text = str(value).strip()
    if not text:
        raise UserError(f"{where} has an empty {name}; correct it, or leave the line out")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {name} has half of a surrogate pair, which no UTF-8 text can hold; correct "
            "it, or leave the line out"
        ) from None
    return text


def _names(pairs: list[Pair]) -> tuple[str, ...]:
    return tuple(sorted({pair.label for pair in pairs} - {NO_LABEL}))


def _label_sets(by_file: dict[str, list[Pair]]) -> list[tuple[int, str]]:
    """(set, name) of each label, sets in the order in which the files name them."""
    sets = dict.fromkeys(_names(pairs) for pairs in by_file.values())
    for names in sets:
        if len(names) == 1:
            raise UserError(
                f"a file of pairs has only the label {names[0]!r}: there is nothing to learn"
            )
    return [(number, name) for number, names in enumerate(filter(None, sets)) for name in names]


def _targets(by_file: dict[str, list[Pair]], labels: list[tuple[int, str]]) -> np.ndarray:
    """The label of each pair, int64 [pairs], in the first set that has all labels of its file."""
    targets = []
    numbers = dict.fromkeys(number for number, _ in labels)
    for path, pairs in by_file.items():
        names = _names(pairs)
        fitting = [n for n in numbers if set(names) <= {name for k, name in labels if k == n}]
        if not fitting:
            raise UserError(
                f"{path} has the labels {', '.join(names)}, which no set of the training pairs has"
            )
        ids = {name: i for i, (number, name) in enumerate(labels) if number == fitting[0]}
        targets += [ids[pair.label] for pair in pairs if pair.label != NO_LABEL]
    return np.array(targets, dtype=np.int64)
