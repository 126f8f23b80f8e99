"""Whole-word marks: which tokens continue the word that the token before them belongs to.

Words come from rjieba (jieba's dictionary, HMM and boundaries, 25 times as fast), once, at
preparation; at training time a mark is one bit of the token and costs nothing. `##` pieces always
continue their word. Rejected: marking by `##` alone, as the usual collators do (every Han character
is then a word), and segmenting in the loader (five times the loader's whole cost).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from clue_ds.data.jit import compiled

Words = Literal["rjieba", "none"]


def word_lengths(text: str) -> np.ndarray:
    """Characters of each word of `text` in order, int32 [words]; separators are words too.

    Line feeds never lie inside a word, so a text of many lines is cut as each of its lines is.
    """
    import rjieba

    words = rjieba.cut(text)
    lengths = np.fromiter(map(len, words), dtype=np.int32, count=len(words))
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

    tokens, starts, line_lengths: as from Tokenizer.encode_marked; lengths: as from word_lengths of
    the same text. The first token of a line begins a word.
    """
    token = 0
    word, word_end = -1, 0
    for line in range(len(line_lengths)):
        previous = -1
        for _ in range(line_lengths[line]):
            while starts[token] >= word_end:
                word += 1
                word_end += lengths[word]
            if word == previous:
                tokens[token] |= continues
            previous = word
            token += 1
