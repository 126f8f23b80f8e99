"""WordPiece over UTF-8 bytes in one compiled pass: bytes -> token ids with continuation bits.

Guarantee: for valid UTF-8 the ids equal those of `transformers`' BertTokenizer with
split_special_tokens, line by line (tests/test_tokenizer.py: every code point, every line of the
corpora).

Rejected: `tokenizers` itself (1.6 MB/s per core, because it computes alignments that are not needed
here) and a C extension (users would need a compiler, and LLVM makes the machine code either way).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clue_ds.data.jit import compiled, inlined
from clue_ds.data.text import code_points

MAX_WORD_CHARS = 100

DONE, NEEDS_PAGE, NEEDS_LIBRARY = range(3)
# Slots of the state array, an int64 [5] through which `encode` and its caller resume a pass: the
# place of the next byte, token, line and character, and the code point at which the pass stopped.
BYTE, TOKEN, LINE, CHAR, CODE_POINT = range(5)

# Indices are unsigned: for signed ones numba checks each time whether they count from the end.
_ZERO, _ONE, _TWO, _THREE, _FOUR = (np.uint64(number) for number in range(5))
_LINE_FEED, _MAX_LENGTH = np.uint64(10), np.uint64(MAX_WORD_CHARS)
_KIND_SHIFT = np.uint32(code_points.KIND_SHIFT)
_PAYLOAD_MASK = np.uint32(code_points.PAYLOAD_MASK)
_UNPROBED, _DROPPED, _SPACE = code_points.UNPROBED, code_points.DROPPED, code_points.SPACE
_ISOLATED, _ORDINARY = code_points.ISOLATED, code_points.ORDINARY
_EXPANDED, _SLOW = code_points.EXPANDED, code_points.SLOW
_HASH = 0x1E3779B97F4A7C15
_ROOT, _CONTINUATION_ROOT = 0, 1


class Trie(NamedTuple):
    """Tokens as paths from two roots: one for beginnings of words, one for `##` pieces.

    Edges from a root are arrays over all code points; all others are in one hash table with open
    addressing.
    """

    first: np.ndarray  # int32 [code points]: node after one character of a word, or -1
    following: np.ndarray  # int32 [code points]: node after one character of a `##` piece, or -1
    token: np.ndarray  # int32 [nodes]: id of the token that ends here, or -1
    edges: np.ndarray  # int64 [power of two]: node << 42 | code point << 21 | next node, or -1


def build_trie(tokens: list[str]) -> Trie:
    """The trie of a vocabulary; the last of several equal tokens counts, as in `transformers`."""
    edges: dict[tuple[int, int], int] = {}
    ends: dict[int, int] = {}
    num_nodes = 2
    for token_id, token in enumerate(tokens):
        if not token:  # an empty line of vocab.txt keeps its id, and no text is this token
            continue
        is_piece = token.startswith("##") and len(token) > 2
        node = _CONTINUATION_ROOT if is_piece else _ROOT
        for character in token[2:] if is_piece else token:
            step = (node, ord(character))
            if step not in edges:
                edges[step] = num_nodes
                num_nodes += 1
            node = edges[step]
        ends[node] = token_id
    token_of_node = np.full(num_nodes, -1, dtype=np.int32)
    for node, token_id in ends.items():
        token_of_node[node] = token_id
    roots = np.full((2, code_points.NUM_CODE_POINTS), -1, dtype=np.int32)
    inner = []
    for (node, code_point), target in edges.items():
        if node <= _CONTINUATION_ROOT:
            roots[node, code_point] = target
        else:
            inner.append(node << 42 | code_point << 21 | target)
    table = np.full(1 << max(4, (4 * len(inner)).bit_length()), -1, dtype=np.int64)
    _fill(table, np.array(inner, dtype=np.int64))
    return Trie(roots[_ROOT], roots[_CONTINUATION_ROOT], token_of_node, table)


@inlined
def _slot(key: int, size: int) -> int:
    return np.uint64((key * _HASH >> 24) & (size - 1))


@inlined
def _next_slot(slot: int, size: int) -> int:
    return (slot + _ONE) & np.uint64(size - 1)


@compiled
def _fill(table: np.ndarray, edges: np.ndarray) -> None:
    for edge in edges:
        slot = _slot(edge >> 21, len(table))
        while table[slot] != -1:
            slot = _next_slot(slot, len(table))
        table[slot] = edge


@inlined
def _step(node: int, code_point: int, edges: np.ndarray) -> int:
    """The node that the edge `code_point` of `node` leads to, or -1."""
    key = np.int64(node) << 21 | np.int64(code_point)
    slot = _slot(key, len(edges))
    while edges[slot] != -1:
        if edges[slot] >> 21 == key:
            return edges[slot] & 0x1FFFFF
        slot = _next_slot(slot, len(edges))
    return np.int64(-1)


@inlined
def _emit_word(
    word: np.ndarray,
    word_starts: np.ndarray,
    length: int,
    trie: Trie,
    unk_id: int,
    continues: int,
    ids: np.ndarray,
    starts: np.ndarray,
    num_tokens: int,
) -> int:
    """Write the tokens of word[:length]; return the new number of tokens.

    A word of more than MAX_WORD_CHARS characters, or one that tokens can't cover, is one [UNK].
    """
    begin = _ZERO
    end_token = num_tokens
    # One turn writes one token: the longest that matches at `begin`.
    while begin < length and length <= _MAX_LENGTH:
        node = np.int64(trie.following[word[begin]] if begin else trie.first[word[begin]])
        match, match_end = np.int64(-1), begin
        cursor = begin + _ONE
        # One turn follows one edge of the trie; the last token passed is the longest match.
        while node >= 0:
            token = trie.token[np.uint64(node)]
            if token >= 0:
                match, match_end = np.int64(token), cursor
            if cursor == length:
                break
            node = _step(node, word[cursor], trie.edges)
            cursor += _ONE
        if match < 0:
            break
        ids[end_token] = match | continues if begin else match
        starts[end_token] = word_starts[begin]
        end_token += _ONE
        begin = match_end
    if begin == length:
        return end_token
    # No token matches some part of the word, so one [UNK] replaces what was written of it.
    ids[num_tokens] = unk_id
    starts[num_tokens] = word_starts[0]
    return num_tokens + _ONE


@inlined
def _bits(byte: int, mask: int, shift: int) -> int:
    return np.uint64(byte & mask) << np.uint64(shift)


@inlined
def _han(data: np.ndarray, at: int) -> int:
    """The code point of the character of three bytes at `at`, as all common Han are."""
    low = _bits(data[at + _ONE], 0x3F, 6) | _bits(data[at + _TWO], 0x3F, 0)
    return _bits(data[at], 0x0F, 12) | low


@inlined
def _decode(data: np.ndarray, at: int) -> tuple[int, int]:
    """The code point at byte `at` of valid UTF-8, and its number of bytes."""
    lead = data[at]
    if lead < 0x80:
        return np.uint64(lead), _ONE
    if lead < 0xE0:
        return _bits(lead, 0x1F, 6) | _bits(data[at + _ONE], 0x3F, 0), _TWO
    if lead < 0xF0:
        return _han(data, at), _THREE
    high = _bits(lead, 0x07, 18) | _bits(data[at + _ONE], 0x3F, 12)
    return high | _bits(data[at + _TWO], 0x3F, 6) | _bits(data[at + _THREE], 0x3F, 0), _FOUR


@compiled
def encode(
    data: np.ndarray,
    entries: np.ndarray,
    expansions: np.ndarray,
    trie: Trie,
    unk_id: int,
    continues: int,
    ids: np.ndarray,
    starts: np.ndarray,
    line_lengths: np.ndarray,
    state: np.ndarray,
) -> int:
    """Encode the lines of `data` from state[BYTE] on; return DONE, NEEDS_PAGE or NEEDS_LIBRARY.

    data: uint8 [bytes], valid UTF-8 that ends with a line feed.
    ids: uint16 or uint32 [>= bytes], token ids, with the bit `continues` on `##` pieces.
    starts: uint32 [>= bytes], the character of `data` at which each token begins.
    line_lengths: int64 [lines], tokens per line.
    state: int64 [5], how far the three are filled; always the start of a line on return.

    The pass stops at a line with a code point that has not been probed (NEEDS_PAGE: the caller
    probes it) or that the table can't describe (NEEDS_LIBRARY: the caller encodes the line and
    moves `state` to the next one). The caller then calls again.
    """
    # Room for one character more than the longest word that is not [UNK].
    word = np.empty(MAX_WORD_CHARS + 1, dtype=np.uint64)
    word_starts = np.empty(MAX_WORD_CHARS + 1, dtype=np.uint32)
    end = np.uint64(len(data))
    at, num_tokens, char = np.uint64(state[BYTE]), np.uint64(state[TOKEN]), state[CHAR]
    # One turn takes any number of Han characters, then at most one word of other characters, then
    # the one character behind that. `at` is always the first byte of a character.
    while at < end:
        # Most characters of a Chinese text go through this loop, so it does nothing else.
        while 0xE0 <= data[at] < 0xF0:
            entry = entries[_han(data, at)]
            if entry >> _KIND_SHIFT != _ISOLATED:
                break
            ids[num_tokens], starts[num_tokens] = entry & _PAYLOAD_MASK, char
            num_tokens, at, char = num_tokens + _ONE, at + _THREE, char + 1
        code_point, num_bytes = _decode(data, at)
        entry = entries[code_point]
        kind = entry >> _KIND_SHIFT
        length = _ZERO
        # Collect a word, up to the first character that can't be part of one; that is the line feed
        # at the latest. A character that normalisation drops doesn't end a word. Of a word that is
        # too long, one character more than the limit is kept, by which `_emit_word` knows it.
        while kind == _ORDINARY or kind == _EXPANDED or (kind == _DROPPED and length):
            payload = np.int64(entry & _PAYLOAD_MASK)
            if kind == _ORDINARY and length <= _MAX_LENGTH:
                word[length], word_starts[length] = payload, char
                length += _ONE
            elif kind == _EXPANDED:
                for i in range(payload + 1, payload + 1 + expansions[payload]):
                    if length <= _MAX_LENGTH:
                        word[length], word_starts[length] = expansions[i], char
                        length += _ONE
            at, char = at + num_bytes, char + 1
            code_point, num_bytes = _decode(data, at)
            entry = entries[code_point]
            kind = entry >> _KIND_SHIFT
        if length:
            num_tokens = _emit_word(
                word, word_starts, length, trie, unk_id, continues, ids, starts, num_tokens
            )
        # The character behind the word; without a word, the first one that is not Han.
        if kind == _ISOLATED:
            ids[num_tokens], starts[num_tokens] = entry & _PAYLOAD_MASK, char
            num_tokens += _ONE
        elif kind == _UNPROBED or kind == _SLOW:
            # Tokens of this line so far are forgotten: `state` is still at the start of the line.
            state[CODE_POINT] = code_point
            return NEEDS_PAGE if kind == _UNPROBED else NEEDS_LIBRARY
        at, char = at + num_bytes, char + 1
        if code_point == _LINE_FEED:
            line_lengths[state[LINE]] = np.int64(num_tokens) - state[TOKEN]
            state[BYTE], state[TOKEN], state[CHAR] = np.int64(at), np.int64(num_tokens), char
            state[LINE] += 1
    return DONE
