"""From a chunk of raw input to the arrays of one shard: what one worker computes.

The steps, in order: decode, edit, convert to simplified characters, tokenise, mark words, find
documents, drop, set held-out documents aside. Each step works on whole arrays of a block of text
(about a megabyte); the only Python loops over lines are over lines without tokens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clue_ds.data.build import clean
from clue_ds.data.build.options import FOREIGN, KEPT, REASONS, ConvertOptions
from clue_ds.data.corpus import ShardArrays
from clue_ds.data.text.decode import MAX_SAMPLES, Tally, text_blocks
from clue_ds.data.text.inputs import Segment
from clue_ds.data.text.tokenizer import Tokenizer
from clue_ds.data.text.words import mark_words, word_lengths

_LATIN_WORD = re.compile("[A-Za-z0-9]{1,12}")


class Converted(NamedTuple):
    """The result of converting a chunk."""

    training: ShardArrays
    held_out: ShardArrays
    hashes: np.ndarray  # uint64 [documents of both], in the order of the input; empty if not needed
    keys: np.ndarray  # uint64 [bands, documents of both]: their near_keys; empty if not needed
    tally: Tally
    seconds: tuple[float, float]  # processor time: for finding words, for everything


class Converter:
    """Converts chunks; each process makes one of these and keeps it."""

    def __init__(self, vocab_file: str, options: ConvertOptions) -> None:
        self.options = options
        self.tokenizer = Tokenizer(vocab_file, options.lower_case)
        self._seconds_for_words = 0.0
        self._simplify: Callable[[str], str] | None = None
        if options.t2s:
            import opencc

            self._simplify = opencc.OpenCC("t2s").convert

    def convert(self, chunk: list[Segment]) -> Converted:
        """The arrays of one shard, which may have no tokens at all, and the tally of its input.

        Removes the segments from `chunk` one by one, so that memory is freed as text is converted.
        """
        begin, self._seconds_for_words = time.process_time(), 0.0
        tally = Tally()
        arrays, facts = self._tokenise(chunk, tally)
        tally.counts["documents"] += len(arrays.document_ends)
        training, held_out, hashes, keys = self._select(arrays, facts, tally)
        seconds = (self._seconds_for_words, time.process_time() - begin)
        return Converted(training, held_out, hashes, keys, tally, seconds)

    def _tokenise(self, chunk: list[Segment], tally: Tally) -> tuple[ShardArrays, np.ndarray]:
        """All sentences of the chunk, and their `line_facts`, uint64 [3, sentences]."""
        tokens: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        facts: list[np.ndarray] = []
        document_ends: list[np.ndarray] = []
        num_sentences = 0
        options = self.options
        while chunk:
            segment = chunk.pop(0)
            for block in text_blocks(segment, options.text_field, options.on_error, tally):
                block_tokens, block_lengths, block_facts, ends = self._convert_block(block, tally)
                tokens.append(block_tokens)
                lengths.append(block_lengths)
                facts.append(block_facts)
                document_ends.append(ends + num_sentences)
                num_sentences += len(block_lengths)
            document_ends.append(np.array([num_sentences]))
            tally.counts["documents_split"] += segment.splits_document
        ends = np.unique(np.concatenate(document_ends))
        arrays = ShardArrays(
            tokens=np.concatenate([np.empty(0, self.tokenizer.dtype), *tokens]),
            sentence_ends=np.cumsum(np.concatenate([np.empty(0, np.int64), *lengths])),
            document_ends=ends[ends > 0],
        )
        return arrays, np.concatenate([np.empty((3, 0), np.uint64), *facts], axis=1)

    def _convert_block(
        self, original: str, tally: Tally
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Arrays of a block: marked tokens [tokens], tokens per sentence [sentences], `line_facts`
        [3, sentences], and the numbers of sentences after which documents end [documents]."""
        options = self.options
        data = original.encode()
        text = clean.edit(original, data, options.clean, tally)
        if self._simplify is not None:
            text = self._simplify(text)
        if text is not original:
            data = text.encode()
        tokens, starts, line_lengths = self.tokenizer.encode_marked(data)
        self._count_unknown(text, tokens, starts, tally)
        if options.words != "none":
            begin = time.process_time()
            lengths = word_lengths(text, options.words)
            mark_words(tokens, starts, line_lengths, lengths, self.tokenizer.continues)
            self._seconds_for_words += time.process_time() - begin
        is_sentence = line_lengths > 0
        is_blank = np.zeros(len(line_lengths), dtype=bool)
        empty_lines = np.flatnonzero(~is_sentence)
        if len(empty_lines):
            # A line that cleaning emptied doesn't end a document; a line that was blank does.
            lines = original.split("\n")
            is_blank[empty_lines] = [not lines[i] or lines[i].isspace() for i in empty_lines]
        num_blank = int(is_blank.sum())
        tally.counts["lines"] += len(line_lengths)
        tally.counts["blank_lines"] += num_blank
        tally.counts["lines_without_tokens"] += len(empty_lines) - num_blank
        facts = np.zeros((3, len(line_lengths)), dtype=np.uint64)
        if options.reads_lines:
            clean.line_facts(np.frombuffer(data, np.uint8), *facts)
        return (
            tokens.copy(),  # it is a view of a buffer several times as large
            line_lengths[is_sentence],
            facts[:, is_sentence],
            np.cumsum(is_sentence)[is_blank],
        )

    def _count_unknown(
        self, text: str, tokens: np.ndarray, starts: np.ndarray, tally: Tally
    ) -> None:
        """Count what became [UNK]: Latin words as words, everything else by its first character."""
        for start in starts[tokens == self.tokenizer.unk_id].tolist():
            word = _LATIN_WORD.match(text, start)
            tally.unknown[word[0] if word else text[start]] += 1

    def _select(
        self, arrays: ShardArrays, facts: np.ndarray, tally: Tally
    ) -> tuple[ShardArrays, ShardArrays, np.ndarray, np.ndarray]:
        """(training arrays, held-out arrays, hashes, keys): `Converted` has them with its names."""
        empty = np.empty(0, np.uint64)
        nothing = clean.take(arrays, np.zeros(len(arrays.sentence_ends), dtype=bool))
        options = self.options
        if not options.reads_lines:
            return arrays, nothing, empty, empty.reshape(0, 0)
        ends = arrays.document_ends
        reasons = clean.select(options.clean, facts[0], facts[1], facts[2], ends)
        self._account(arrays, reasons, tally)
        hashes = clean.document_hashes(facts[0], reasons, ends)
        num_kept = np.diff(np.concatenate([[0], np.cumsum(reasons == KEPT)])[ends], prepend=0)
        arrays = clean.take(arrays, reasons == KEPT)
        hashes = hashes[num_kept > 0]
        keys = empty.reshape(0, 0)
        if options.clean.near_duplicates:
            from clue_ds.data.build.dedup import near_keys

            similarity = options.clean.near_duplicates
            keys = near_keys(arrays, self.tokenizer.continues, similarity)
        aside = np.repeat(
            is_held_out(hashes, options.held_out), np.diff(arrays.document_ends, prepend=0)
        )
        return clean.take(arrays, ~aside), clean.take(arrays, aside), hashes, keys

    def _account(self, arrays: ShardArrays, reasons: np.ndarray, tally: Tally) -> None:
        """Count the dropped sentences and documents, and keep samples of them."""
        for code, reason in enumerate(REASONS[1:], start=1):
            dropped = np.flatnonzero(reasons == code)
            if code >= FOREIGN:
                # These reasons drop whole documents; the sample of one is its first sentence.
                document = np.searchsorted(arrays.document_ends, dropped, side="right")
                dropped_documents, first = np.unique(document, return_index=True)
                tally.counts[f"documents_{reason}"] += len(dropped_documents)
                samples = dropped[first]
            else:
                samples = dropped
            tally.counts[f"lines_{reason}"] += len(dropped)
            add_samples(self.tokenizer, arrays, samples, reason, tally)
        is_left = (reasons == KEPT) | (reasons == FOREIGN)
        left = np.diff(np.concatenate([[0], np.cumsum(is_left)])[arrays.document_ends], prepend=0)
        tally.counts["documents_emptied"] += int((left == 0).sum())


def add_samples(
    tokenizer: Tokenizer, arrays: ShardArrays, sentences: np.ndarray, rule: str, tally: Tally
) -> None:
    """Keep the first few of `sentences` (their indices) as samples of what `rule` dropped."""
    for sentence in sentences[: 20 * MAX_SAMPLES]:  # more than MAX_SAMPLES: some texts are equal
        begin = arrays.sentence_ends[sentence - 1] if sentence else 0
        ids = arrays.tokens[begin : arrays.sentence_ends[sentence]] & (tokenizer.continues - 1)
        text = tokenizer.text(ids[:100])
        tally.sample(rule, text + (" ..." if len(ids) > 100 else ""))


def is_held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool [documents]: whether each document is held out, which its hash alone decides."""
    if share <= 0:
        return np.zeros(len(hashes), dtype=bool)
    return hashes < np.uint64(share * 2.0**64)
