"""What BERT's normaliser and pre-tokenizer do to each code point, as a table.

The table is not written from the rules. Each entry records what the `tokenizers` library did with
that code point between two letters, so the table is exact for the installed version of the library
and for the Unicode version that it was built with. Probing all 1.1 million code points takes
seconds, and text uses few of them, so entries are probed in pages of 256 when a text first needs
them (1 ms per page; Chinese corpora need about 150 pages). Rejected: a cache file, which would need
keys, locks and a writable directory, and would save less than a second.

Two kinds of code points need more than one entry can hold. Combining marks that survive
normalisation may trade places with their neighbours (`SLOW`: the library encodes such a line). Code
points that normalisation turns into several have their result in a second table (`EXPANDED`: Hangul
syllables, which decompose into letters).
"""

from __future__ import annotations

import threading

import numpy as np
from tokenizers import normalizers, pre_tokenizers

NUM_CODE_POINTS = 0x110000
PAGE = 256
# All of Unicode 16 needs 44,000: the 11,172 Hangul syllables become two or three letters each.
MAX_EXPANSIONS = 1 << 17

# Kinds, in the top 8 bits of an entry; the low 24 bits are the payload.
UNPROBED, DROPPED, SPACE, ISOLATED, ORDINARY, EXPANDED, SLOW = range(7)
KIND_SHIFT = 24
PAYLOAD_MASK = (1 << KIND_SHIFT) - 1

# This mark has combining class 1, the lowest above zero, and is itself removed with the accents.
# Whatever mark it overtakes in canonical order is one that can be reordered.
_LOWEST_MARK = "\u0334"


class CodePoints:
    """The table, `entries` uint32 [NUM_CODE_POINTS]: kind << 24 | payload; 0 where not probed yet.

    The payload depends on the kind. ISOLATED (a word of one character: Han, punctuation): the id
    of its token, so that most characters of a Chinese text take one look-up. ORDINARY (a character
    of a longer word): the normalised code point. EXPANDED: an index into `expansions`, where the
    number of code points is followed by the code points.
    """

    def __init__(self, lower_case: bool, ids: dict[str, int], unk_id: int) -> None:
        self._ids = ids
        self._unk_id = unk_id
        self.normalizer = normalizers.BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=lower_case
        )
        self.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.decompose = normalizers.NFD() if lower_case else None
        self.entries = np.zeros(NUM_CODE_POINTS, dtype=np.uint32)
        # Never reallocated: compiled code of another thread may be reading while a page is added.
        self.expansions = np.zeros(MAX_EXPANSIONS, dtype=np.int32)
        self._num_expansions = 0
        self._lock = threading.Lock()

    def probe_page(self, code_point: int) -> None:
        """Fill the entries of the page of 256 code points that holds `code_point`."""
        begin = code_point // PAGE * PAGE
        with self._lock:
            if not self.entries[begin]:
                page = [self._probe(c) for c in range(begin, begin + PAGE)]
                self.entries[begin : begin + PAGE] = page

    def _split(self, text: str) -> list[str]:
        """The words of `text` after normalisation."""
        normalized = self.normalizer.normalize_str(text)
        return [word for word, _ in self.pre_tokenizer.pre_tokenize_str(normalized)]

    def _probe(self, code_point: int) -> int:
        if 0xD800 <= code_point < 0xE000:  # surrogates: not in UTF-8
            return SLOW << KIND_SHIFT
        character = chr(code_point)
        words = self._split(f"a{character}a")
        if words == ["aa"]:
            return DROPPED << KIND_SHIFT
        if words == ["a", "a"]:
            return SPACE << KIND_SHIFT
        if self.decompose is not None and self._moves(character):
            return SLOW << KIND_SHIFT
        if len(words) == 3 and len(words[1]) == 1 and words[0] == words[2] == "a":
            return ISOLATED << KIND_SHIFT | self._ids.get(words[1], self._unk_id)
        if len(words) == 1:
            return self._ordinary(character, words[0][1:-1])
        return SLOW << KIND_SHIFT

    def _ordinary(self, character: str, normalized: str) -> int:
        if len(normalized) == 1:
            return ORDINARY << KIND_SHIFT | ord(normalized)
        # Output buffers hold one token per input byte; a longer expansion is left to the library.
        if len(normalized) > len(character.encode()):
            return SLOW << KIND_SHIFT
        index = self._num_expansions
        self._num_expansions += 1 + len(normalized)
        self.expansions[index : self._num_expansions] = [len(normalized), *map(ord, normalized)]
        return EXPANDED << KIND_SHIFT | index

    def _moves(self, character: str) -> bool:
        """Whether normalisation keeps a mark of `character` that can trade places with another."""
        assert self.decompose is not None
        ordered = self.decompose.normalize_str(f"a{character}{_LOWEST_MARK}a")
        overtaken = ordered[ordered.index(_LOWEST_MARK) + 1 : -1]
        return any(self._split(f"a{mark}a") != ["aa"] for mark in overtaken)
