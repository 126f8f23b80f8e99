"""Questions with their contexts as the model reads them: windows of tokens with their places.

    [CLS] question [SEP] window of the context [SEP]

A context that is longer than the model's input is read in several windows, each `stride` tokens
after the one before. A token that is in several windows can begin an answer only in the window
where the smaller of its two sides of context is largest.

Every token knows the characters of the original context that it stands for, so an answer is cut
from the original and never put together from tokens, which have lost case, accents and spaces.

T: tokens of a window's part of the context
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clue_ds.tasks.features import Features
from clue_ds.tasks.kinds.span.simplify import simplify, unchanged

if TYPE_CHECKING:
    from clue_ds.data import Tokenizer


class Reading(NamedTuple):
    """A question and the text in which its answer is."""

    question: str
    context: str


class Window(NamedTuple):
    """One sequence of the model, with the places of its context's tokens in the original."""

    rows: tuple[Features]
    begins: np.ndarray  # int32 [T]: the first character of each token
    ends: np.ndarray  # int32 [T]: the character behind it
    is_best: np.ndarray  # bool [T]: no other window has more context around this token

    @property
    def size(self) -> int:
        return len(self.rows[0].input_ids)

    @property
    def first(self) -> int:
        """The position of the context's first token in the sequence."""
        return self.rows[0].num_first

    @property
    def truncated(self) -> bool:
        """Whether the end of the question was cut off. The windows have the whole context."""
        return self.rows[0].truncated


class Limits(NamedTuple):
    """How long the parts of a sequence may be, in tokens."""

    sequence: int  # all of it
    question: int = 64
    stride: int = 128  # from the start of a window to the start of the next


def windows(
    tokenizer: Tokenizer, reading: Reading, limits: Limits, to_simplified: bool = False
) -> list[Window]:
    """The windows of a question's context, at least one; they have every token of it."""
    converted = (simplify if to_simplified else unchanged)(reading.question).text
    question = tokenizer.encode(converted)
    # Half of the sequence is left for the context, however long the question is.
    num_question = min(len(question), limits.question, (limits.sequence - 3) // 2)
    head = np.array([tokenizer.cls_id, *question[:num_question], tokenizer.sep_id])
    ids, begins, ends = tokens_with_places(tokenizer, reading.context, to_simplified)
    room = limits.sequence - len(head) - 1
    spans = window_spans(len(ids), room, limits.stride)
    best = best_windows(spans, len(ids))
    found = []
    for number, (begin, end) in enumerate(spans):
        sequence = np.concatenate([head, ids[begin:end], [tokenizer.sep_id]]).astype(np.int64)
        row = Features(sequence, len(head), num_question < len(question))
        is_best = best[begin:end] == number
        found.append(Window((row,), begins[begin:end], ends[begin:end], is_best))
    return found


def tokens_with_places(
    tokenizer: Tokenizer, text: str, to_simplified: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids of `text`, and the characters of it at which each token begins and ends.

    A token ends where the next one begins, less the characters between them that nobody sees.
    Combining marks belong to the token before them.
    """
    converted = (simplify if to_simplified else unchanged)(text)
    data = converted.text.replace("\n", " ").encode()
    marked, starts, _ = tokenizer.encode_marked(data)
    ids = (marked & (tokenizer.continues - 1)).astype(np.int64)
    if not len(ids):
        return ids, np.zeros(0, np.int32), np.zeros(0, np.int32)
    begins = starts.astype(np.int64)
    codes = np.frombuffer(converted.text.encode("utf-32-le"), "<u4")
    places = np.arange(len(codes))
    # [characters]: the end of the last visible character up to each one.
    visible_end = np.maximum.accumulate(np.where(_invisible()[codes], 0, places + 1))
    next_begins = np.append(begins[1:], len(codes))
    # A Hangul syllable may be several tokens, all of which begin at it.
    ends = np.maximum(begins + 1, visible_end[np.maximum(next_begins, 1) - 1])
    return ids, converted.begins[begins].astype(np.int32), converted.ends[ends - 1].astype(np.int32)


@functools.cache
def _invisible() -> np.ndarray:
    """bool [code points]: spaces, control and format characters, U+FFFD. They make no tokens."""
    kinds = [unicodedata.category(chr(code))[0] in "CZ" for code in range(sys.maxunicode + 1)]
    kinds[0xFFFD] = True
    return np.array(kinds)


def is_blank(text: str) -> bool:
    """Whether a text has no visible character."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return bool(_invisible()[codes].all())


def window_spans(num_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """(first token, token behind the last) of each window of at most `room` tokens."""
    step = min(stride, room)  # a longer step would leave tokens out
    spans = []
    begin = 0
    while True:
        end = min(begin + room, num_tokens)
        spans.append((begin, end))
        if end == num_tokens:
            return spans
        begin += step


def best_windows(spans: Sequence[tuple[int, int]], num_tokens: int) -> np.ndarray:
    """int64 [tokens]: the window in which each token has most context, the first of equal ones.

    What counts is the smaller of the numbers of tokens on its left and right in the window. The
    length of a window adds a little, as in BERT's own script, to prefer the longer of two.
    """
    best = np.zeros(num_tokens, np.int64)
    most = np.full(num_tokens, -1.0)
    for number, (begin, end) in enumerate(spans):
        places = np.arange(begin, end)
        context = np.minimum(places - begin, end - 1 - places) + 0.01 * (end - begin)
        is_more = context > most[begin:end]
        best[begin:end][is_more] = number
        most[begin:end][is_more] = context[is_more]
    return best


def target(window: Window, begin: int, end: int) -> tuple[int, int]:
    """The positions of the tokens of characters begin..end; (0, 0) if some are not in the window.

    Position 0 is [CLS], which says that this window does not have the answer.
    """
    if not len(window.begins) or begin < window.begins[0] or end > window.ends[-1]:
        return 0, 0
    first = int(np.searchsorted(window.ends, begin, side="right"))
    last = int(np.searchsorted(window.begins, end, side="left")) - 1
    return (window.first + first, window.first + last) if first <= last else (0, 0)
