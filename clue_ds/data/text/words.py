"""Whole-word marks: which tokens continue the word that the token before them belongs to.

Words are found once, when the corpus is made: by rjieba (jieba's dictionary, HMM and boundaries, 25
times as fast) or by the spaces of text that is already segmented. In training a mark is one bit of
the token and costs nothing. `##` pieces always continue their word. Rejected: marking `##` pieces
only, as the usual collators do (every Han character is then a word), and segmenting in the loader
(five times the cost of the whole loader).
"""

from __future__ import annotations

import re

import numpy as np

from clue_ds.data.jit import compiled
from clue_ds.data.text.choices import Words

# rjieba returns a list of strings, 100 bytes per word, so text is given to it in spans of about
# this many characters. A span ends with a character that no word contains.
_SPAN_CHARS = 1 << 14
_SPAN_ENDS = re.compile("[\n。！？，；]")
# Tab, line feed, carriage return, space, no-break space, ideographic space.
_SPACES = np.array([0x09, 0x0A, 0x0D, 0x20, 0xA0, 0x3000], dtype=np.uint32)


def word_lengths(text: str, words: Words) -> np.ndarray:
    """Number of characters of each word of `text`, int32 [words]; separators are words too.

    No word contains a line feed, so a text of many lines has the words of its lines.
    """
    return _between_spaces(text) if words == "segmented" else _by_rjieba(text)


def _between_spaces(text: str) -> np.ndarray:
    """Lengths of the runs of characters that are either all spaces or all not."""
    if not text:
        return np.empty(0, np.int32)
    is_space = np.isin(np.frombuffer(text.encode("utf-32-le"), "<u4"), _SPACES)
    changes = np.flatnonzero(is_space[1:] != is_space[:-1]) + 1
    ends = np.append(changes, len(is_space))
    return np.diff(ends, prepend=0).astype(np.int32)


def _by_rjieba(text: str) -> np.ndarray:
    import rjieba

    spans = [np.empty(0, np.int32)]
    begin = 0
    while begin < len(text):
        boundary = _SPAN_ENDS.search(text, begin + _SPAN_CHARS)
        end = boundary.end() if boundary else len(text)
        words = rjieba.cut(text[begin:end])
        spans.append(np.fromiter(map(len, words), dtype=np.int32, count=len(words)))
        begin = end
    lengths = np.concatenate(spans)
    assert lengths.sum() == len(text), "rjieba lost characters"
    return lengths


@compiled
def mark_words(
    tokens: np.ndarray,
    starts: np.ndarray,
    line_lengths: np.ndarray,
    lengths: np.ndarray,
    continues: int,
) -> None:
    """Set the bit `continues` on tokens that begin in the same word as the token before them.

    tokens, starts, line_lengths: from Tokenizer.encode_marked; lengths: from word_lengths of the
    same text. The first token of a line is never marked.
    """
    token = 0
    word, word_end = -1, 0
    for line in range(len(line_lengths)):
        previous = -1  # the word of the token before: none at the start of a line
        for _ in range(line_lengths[line]):
            # Move on to the word in which this token begins; a word may have no token.
            while starts[token] >= word_end:
                word += 1
                word_end += lengths[word]
            if word == previous:
                tokens[token] |= continues
            previous = word
            token += 1
