"""Traditional text in simplified characters, with the place of each character in the original.

The vocabulary of CLUE has no traditional characters: a third of DRCD's Han characters would be
[UNK]. The model reads the converted text, and answers are cut from the original, so they are in
traditional characters again. OpenCC's conversion from traditional to simplified keeps the length of
almost every text, but some phrases have another length; no code relies on equal lengths.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

# OpenCC converts phrases, and no phrase contains one of these. The pieces between them are
# converted and aligned each for itself, so that a change of length moves nothing beyond its piece,
# and two changes that cancel each other are seen.
_BOUNDARIES = re.compile("(?<=[\n。！？，；：、「」『』（）《》])")


class Simplified(NamedTuple):
    """A converted text. Character i of it stands for original[begins[i] : ends[i]]."""

    text: str
    begins: np.ndarray  # int64 [characters of text]
    ends: np.ndarray  # int64 [characters of text]


@functools.cache
def _converter() -> Callable[[str], str]:
    import opencc

    return opencc.OpenCC("t2s").convert


def unchanged(text: str) -> Simplified:
    """`text` as it is, every character in its own place."""
    begins = np.arange(len(text))
    return Simplified(text, begins, begins + 1)


def simplify(text: str, convert: Callable[[str], str] | None = None) -> Simplified:
    """`text` converted by `convert`, which is OpenCC's t2s by default."""
    convert = convert or _converter()
    pieces, begins, ends, place = [], [], [], 0
    for piece in filter(None, _BOUNDARIES.split(text)):
        part = convert(piece)
        piece_begins, piece_ends = _aligned(piece, part)
        pieces.append(part)
        begins.append(piece_begins + place)
        ends.append(piece_ends + place)
        place += len(piece)
    if not pieces:
        return unchanged(text)
    return Simplified("".join(pieces), np.concatenate(begins), np.concatenate(ends))


def _aligned(original: str, converted: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the characters of `converted` begin and end in `original`.

    Characters that both have in common give the alignment. Where a stretch between them has another
    length, each of its characters stands for the whole stretch. A stretch that has nothing left in
    the converted text belongs to the character before it.
    """
    if len(original) == len(converted):
        return unchanged(original)[1:]
    begins = np.zeros(len(converted), np.int64)
    ends = np.zeros(len(converted), np.int64)
    matcher = SequenceMatcher(None, original, converted, autojunk=False)
    for _, begin, end, new_begin, new_end in matcher.get_opcodes():
        if end - begin == new_end - new_begin:
            begins[new_begin:new_end] = np.arange(begin, end)
            ends[new_begin:new_end] = np.arange(begin, end) + 1
        elif new_begin < new_end:
            begins[new_begin:new_end] = begin
            ends[new_begin:new_end] = max(end, begin)
        elif new_begin:
            ends[new_begin - 1] = end
    return begins, ends
