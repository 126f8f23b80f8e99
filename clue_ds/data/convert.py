"""From a chunk of raw input to the arrays of one shard: the work of one process.

The order is the order in which data flows: decode, convert to simplified characters, tokenise, mark
words, find documents. Everything is done a block of some megabytes at a time on whole arrays; the
only loops over lines in Python are over those that hold no token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from clue_ds.data.corpus import Segment
from clue_ds.data.parsing import OnError, Tally, text_blocks
from clue_ds.data.shards import ShardArrays
from clue_ds.data.tokenizer import Tokenizer
from clue_ds.data.words import Words, mark_words, word_lengths


@dataclass(frozen=True)
class ConvertOptions:
    """What decides which tokens a text becomes; recorded in corpus.json."""

    lower_case: bool = True
    words: Words = "rjieba"
    t2s: bool = False
    text_field: str = "text"
    on_error: OnError = "refuse"

    def as_dict(self) -> dict[str, bool | str]:
        return asdict(self)


class Converter:
    """Turns chunks into shards; made once in each process."""

    def __init__(self, vocab_file: str, options: ConvertOptions) -> None:
        self.options = options
        self.tokenizer = Tokenizer(vocab_file, options.lower_case)
        self._simplify: Callable[[str], str] | None = None
        if options.t2s:
            import opencc

            self._simplify = opencc.OpenCC("t2s").convert

    def convert(self, chunk: list[Segment]) -> tuple[ShardArrays, Tally]:
        """The arrays of one shard (perhaps with no tokens at all), and what was dropped."""
        tally = Tally()
        tokens: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        document_ends: list[np.ndarray] = []
        num_sentences = 0
        for segment in chunk:
            options = self.options
            for block in text_blocks(segment, options.text_field, options.on_error, tally):
                block_tokens, block_lengths, ends = self._convert_block(block, tally)
                tokens.append(block_tokens)
                lengths.append(block_lengths)
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
        tally.counts["sentences"] += len(arrays.sentence_ends)
        return arrays, tally

    def _convert_block(self, text: str, tally: Tally) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Marked tokens, tokens a sentence, and the sentence counts at which documents end."""
        if self._simplify is not None:
            text = self._simplify(text)
        data = text.encode()
        tokens, starts, line_lengths = self.tokenizer.encode_marked(data)
        if self.options.words == "rjieba":
            mark_words(tokens, starts, line_lengths, word_lengths(text), self.tokenizer.continues)
        is_sentence = line_lengths > 0
        is_blank = np.zeros(len(line_lengths), dtype=bool)
        empty_lines = np.flatnonzero(~is_sentence)
        if len(empty_lines):
            lines = text.split("\n")
            is_blank[empty_lines] = [not lines[i] or lines[i].isspace() for i in empty_lines]
        num_blank = int(is_blank.sum())
        tally.counts["lines"] += len(line_lengths)
        tally.counts["blank_lines"] += num_blank
        tally.counts["lines_without_tokens"] += len(empty_lines) - num_blank
        return tokens, line_lengths[is_sentence], np.cumsum(is_sentence)[is_blank]
