"""The cleaning rules: which characters, lines and documents don't get into the corpus.

Rules that edit (controls, html) change the text. Rules that drop work on arrays after tokenisation:
a compiled pass computes a hash, the length and the number of Han characters of every line, and
lines or documents are dropped by comparing these numbers. All rules here look at one document at a
time, so the result doesn't depend on the number of processes. Duplicates depend on all documents
and are found in `dedup.py`.

Guarantee: each line and each document is dropped for one reason at most, the first in the order of
REASONS, so that counts add up. Rejected: the perplexity of a language model as a rule (it prefers
text like its own training text) and lists of bad words (they drop medicine and law).
"""

from __future__ import annotations

import html
import re

import numpy as np

from clue_ds.data.build.options import FOREIGN, KEPT, REPEATED, TOO_LONG, TOO_SHORT, Cleaning
from clue_ds.data.corpus import ShardArrays
from clue_ds.data.counter_rng import derive, mix
from clue_ds.data.jit import compiled
from clue_ds.data.text.decode import Tally

# What BERT's tokenizer drops silently: C0 and C1 except tab and line ends, soft hyphen, zero-width
# and direction marks, byte order mark, replacement character. Removed before words are found.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\ufffd]+"
)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_LINE_ENDS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_SAMPLE_CHARS = 40


def edit(text: str, data: bytes, cleaning: Cleaning, tally: Tally) -> str:
    """`text`, whose UTF-8 is `data`, after the rules that edit; its number of lines is the same."""
    if cleaning.controls and has_controls(np.frombuffer(data, np.uint8)):
        _sample(_CONTROLS, text, "controls", tally)
        edited = _CONTROLS.sub("", text)
        tally.counts["characters_removed"] += len(text) - len(edited)
        text = edited
    if cleaning.html and b"&" in data:
        _sample(_ENTITY, text, "html", tally)
        text, num_entities = _ENTITY.subn(lambda match: _unescape(match[0]), text)
        tally.counts["entities_replaced"] += num_entities
    return text


def _unescape(entity: str) -> str:
    """What `entity` stands for: a line end becomes a space, a control character nothing."""
    return _CONTROLS.sub("", _LINE_ENDS.sub(" ", html.unescape(entity)))


def _sample(pattern: re.Pattern[str], text: str, rule: str, tally: Tally) -> None:
    """Keep matches of `pattern`, with some characters around them, as samples of `rule`."""
    for match in pattern.finditer(text):
        if not tally.wants_sample(rule):
            return
        begin = max(text.rfind("\n", 0, match.start()) + 1, match.start() - _SAMPLE_CHARS)
        line_end = text.find("\n", match.end())
        end = min(line_end if line_end >= 0 else len(text), match.end() + _SAMPLE_CHARS)
        tally.sample(rule, repr(text[begin:end])[1:-1])


@compiled
def has_controls(data: np.ndarray) -> bool:
    """Whether UTF-8 bytes may hold what `_CONTROLS` matches: a fast check before the slow one."""
    at = -1
    # One turn looks at one character. Only its first byte is compared where that is enough; the
    # bytes that continue a character (0x80 to 0xBF) match no branch and are turns that do nothing.
    while at + 1 < len(data):
        at += 1
        byte = data[at]
        if 0xE3 <= byte < 0xEF:  # U+3000 to U+EFFF, most Han among them: none; skip the character
            at += 2
        elif byte < 0x20:
            if byte != 9 and byte != 10 and byte != 13:
                return True
        elif byte == 0x7F:
            return True
        elif byte == 0xC2:  # U+0080 to U+00BF
            if data[at + 1] < 0xA0 or data[at + 1] == 0xAD:
                return True
        elif byte == 0xE2:  # U+2000 to U+207F
            if (data[at + 1] == 0x80 and data[at + 2] != 0x94 and data[at + 2] < 0xAF) and (
                0x8B <= data[at + 2] <= 0x8F or data[at + 2] >= 0xAA
            ):
                return True
            if data[at + 1] == 0x81 and 0xA0 <= data[at + 2] <= 0xA4:
                return True
        elif byte == 0xEF:  # U+FEFF and U+FFFD
            if (data[at + 1] == 0xBB or data[at + 1] == 0xBF) and (
                data[at + 2] == 0xBF or data[at + 2] == 0xBD
            ):
                return True
    return False


@compiled
def line_facts(data: np.ndarray, hashes: np.ndarray, chars: np.ndarray, han: np.ndarray) -> None:
    """Fill in, for each line of valid UTF-8 (uint8 [bytes]), its hash and its counts of characters.

    hashes: uint64 [lines]; chars: uint64 [lines], all characters; han: uint64 [lines], those that
    are Han. White space (ASCII, U+00A0, U+3000) is ignored, so indentation changes none of them.
    """
    line = at = num_chars = num_han = 0
    key = np.uint64(0)
    # One turn decodes one character; a line feed stores the numbers of the line and resets them.
    while at < len(data):
        lead = np.int64(data[at])
        if lead == 10:
            hashes[line], chars[line], han[line] = mix(key), num_chars, num_han
            line, at, num_chars, num_han, key = line + 1, at + 1, 0, 0, np.uint64(0)
            continue
        if lead < 0x80:
            code_point, num_bytes = lead, 1
        elif lead < 0xE0:
            code_point, num_bytes = (lead & 0x1F) << 6 | np.int64(data[at + 1] & 0x3F), 2
        else:
            code_point = np.int64(data[at + 1] & 0x3F) << 6 | np.int64(data[at + 2] & 0x3F)
            num_bytes = 3
            if lead < 0xF0:
                code_point |= (lead & 0x0F) << 12
            else:
                code_point = (lead & 7) << 18 | code_point << 6 | np.int64(data[at + 3] & 0x3F)
                num_bytes = 4
        at += num_bytes
        if code_point <= 32 or code_point == 0xA0 or code_point == 0x3000:
            continue
        key = (key ^ np.uint64(code_point)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
        num_chars += 1
        num_han += (
            0x4E00 <= code_point <= 0x9FFF
            or 0x3400 <= code_point <= 0x4DBF
            or 0xF900 <= code_point <= 0xFAFF
            or 0x20000 <= code_point <= 0x323AF
        )
    # The last line may have no line feed.
    if line < len(hashes):
        hashes[line], chars[line], han[line] = mix(key), num_chars, num_han


@compiled
def document_hashes(
    hashes: np.ndarray, reasons: np.ndarray, document_ends: np.ndarray
) -> np.ndarray:
    """uint64 [documents]: hash of the kept sentences of each document, in their order."""
    result = np.zeros(len(document_ends), dtype=np.uint64)
    begin = 0
    for document in range(len(document_ends)):
        key = np.uint64(0)
        for sentence in range(begin, document_ends[document]):
            if reasons[sentence] == 0:
                key = derive(key, hashes[sentence])
        result[document] = key
        begin = document_ends[document]
    return result


def select(
    cleaning: Cleaning,
    hashes: np.ndarray,
    chars: np.ndarray,
    han: np.ndarray,
    document_ends: np.ndarray,
) -> np.ndarray:
    """uint8 [sentences]: the code of the reason why each sentence is dropped, KEPT if it is not.

    hashes, chars, han: `line_facts` of each sentence; document_ends: number of sentences before the
    end of each document.
    """
    reasons = np.zeros(len(hashes), dtype=np.uint8)
    if cleaning.min_chars:
        reasons[chars < cleaning.min_chars] = TOO_SHORT
    if cleaning.max_chars:
        reasons[chars > cleaning.max_chars] = TOO_LONG
    document = np.repeat(np.arange(len(document_ends)), np.diff(document_ends, prepend=0))
    if cleaning.repeated_lines:
        order = np.lexsort((hashes, document))  # stable: the first of equals stays the first
        is_repeat = np.zeros(len(hashes), dtype=bool)
        same = (np.diff(document[order]) == 0) & (hashes[order][1:] == hashes[order][:-1])
        is_repeat[order[1:][same]] = True
        reasons[is_repeat & (reasons == KEPT)] = REPEATED
    if cleaning.min_han:
        kept = reasons == KEPT
        totals = np.bincount(document[kept], chars[kept], len(document_ends))
        num_han = np.bincount(document[kept], han[kept], len(document_ends))
        reasons[kept & (num_han < cleaning.min_han * totals)[document]] = FOREIGN
    return reasons


def take(arrays: ShardArrays, keep: np.ndarray) -> ShardArrays:
    """The sentences for which `keep`, bool [sentences], is true; documents without any are gone."""
    if keep.all():
        return arrays
    lengths = np.diff(arrays.sentence_ends, prepend=0)
    ends = np.concatenate([[0], np.cumsum(keep)])[arrays.document_ends]
    return ShardArrays(
        tokens=arrays.tokens[np.repeat(keep, lengths)],
        sentence_ends=np.cumsum(lengths[keep]),
        document_ends=np.unique(ends[ends > 0]),
    )
