"""WordPiece over UTF-8 bytes in one compiled pass: bytes -> token ids with continuation bits.

Guarantees: for valid UTF-8 the ids equal those of `transformers`' BertTokenizer with
split_special_tokens, line by line (tests/test_tokenizer.py: every code point, every line of the
corpora). Longest match first over a trie; a word of more than 100 characters, or one with a part
that no token matches, is one [UNK].

The pass stops at the start of a line that it can't do: one with a code point that is not probed yet
(UNPROBED) or one that the table can't describe (SLOW); `tokenizer.py` helps and resumes it.
Rejected: `tokenizers` itself (1.6 MB/s a core: it keeps alignments that nobody reads here) and a C
extension (twice as fast as this, but users would need a compiler).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clue_ds.data import code_points
from clue_ds.data.jit import compiled, inlined

MAX_WORD_CHARS = 100

DONE, NEEDS_PAGE, NEEDS_LIBRARY = range(3)
# Slots of the state array, an int64 [5] that both sides of a resumed pass share.
BYTE, TOKEN, LINE, CHAR, CODE_POINT = range(5)

_KIND_SHIFT = np.uint32(code_points.KIND_SHIFT)
_PAYLOAD_MASK = np.uint32(code_points.PAYLOAD_MASK)
_UNPROBED, _SPACE = code_points.UNPROBED, code_points.SPACE
_ISOLATED, _ORDINARY = code_points.ISOLATED, code_points.ORDINARY
_EXPANDED, _SLOW = code_points.EXPANDED, code_points.SLOW
_HASH = 0x1E3779B97F4A7C15
_ROOT, _CONTINUATION_ROOT = 0, 1


class Trie(NamedTuple):
    """Tokens as paths from two roots: one for word beginnings, one for `##` pieces.

    Steps from a root are arrays over code points; the others an open-addressing hash table.
    """

    first: np.ndarray  # int32 [code points]: node after one character of a word, or -1
    following: np.ndarray  # int32 [code points]: node after one character of a `##` piece, or -1
    token: np.ndarray  # int32 [nodes]: id of the token that ends here, or -1
    edge_keys: np.ndarray  # int64 [power of two]: node << 21 | code point, or -1
    edge_nodes: np.ndarray  # int32, same length: the node that the edge leads to


def build_trie(tokens: list[str]) -> Trie:
    """The trie of a vocabulary; of equal tokens the last one counts, as in `transformers`."""
    edges: dict[tuple[int, int], int] = {}
    ends: dict[int, int] = {}
    num_nodes = 2
    for token_id, token in enumerate(tokens):
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
            inner.append((node << 21 | code_point, target))
    size = 1 << max(4, (4 * len(inner)).bit_length())
    edge_keys = np.full(size, -1, dtype=np.int64)
    edge_nodes = np.zeros(size, dtype=np.int32)
    pairs = np.array(inner, dtype=np.int64).reshape(-1, 2)
    _fill(edge_keys, edge_nodes, pairs)
    return Trie(roots[_ROOT], roots[_CONTINUATION_ROOT], token_of_node, edge_keys, edge_nodes)


@inlined
def _slot(key: int, size: int) -> int:
    return ((key * _HASH) >> 24) & (size - 1)


@compiled
def _fill(edge_keys: np.ndarray, edge_nodes: np.ndarray, pairs: np.ndarray) -> None:
    for i in range(len(pairs)):
        slot = _slot(pairs[i, 0], len(edge_keys))
        while edge_keys[slot] != -1:
            slot = (slot + 1) & (len(edge_keys) - 1)
        edge_keys[slot] = pairs[i, 0]
        edge_nodes[slot] = pairs[i, 1]


@inlined
def _step(node: int, code_point: int, edge_keys: np.ndarray, edge_nodes: np.ndarray) -> int:
    """The node after `code_point`, or -1."""
    key = np.int64(node) << 21 | np.int64(code_point)
    slot = _slot(key, len(edge_keys))
    while edge_keys[slot] != -1:
        if edge_keys[slot] == key:
            return np.int64(edge_nodes[slot])
        slot = (slot + 1) & (len(edge_keys) - 1)
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
    """Write the tokens of word[:length]; return the new number of tokens."""
    begin = 0
    end_token = num_tokens
    while begin < length and length <= MAX_WORD_CHARS:
        node = np.int64(trie.following[word[begin]] if begin else trie.first[word[begin]])
        match, match_end = np.int64(-1), begin
        cursor = begin + 1
        while node >= 0:
            if trie.token[node] >= 0:
                match, match_end = np.int64(trie.token[node]), cursor
            if cursor == length:
                break
            node = _step(node, word[cursor], trie.edge_keys, trie.edge_nodes)
            cursor += 1
        if match < 0:
            break
        ids[end_token] = match | continues if begin else match
        starts[end_token] = word_starts[begin]
        end_token += 1
        begin = match_end
    if begin == length:
        return end_token
    ids[num_tokens] = unk_id
    starts[num_tokens] = word_starts[0]
    return num_tokens + 1


@inlined
def _decode(data: np.ndarray, at: int) -> tuple[int, int]:
    """The code point at byte `at` of valid UTF-8, and its number of bytes."""
    lead = np.int64(data[at])
    if 0xE0 <= lead < 0xF0:  # Han: asked first
        low = np.int64(data[at + 1] & 0x3F) << 6 | np.int64(data[at + 2] & 0x3F)
        return (lead & 0x0F) << 12 | low, 3
    if lead < 0x80:
        return lead, 1
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | np.int64(data[at + 1] & 0x3F), 2
    low = np.int64(data[at + 1] & 0x3F) << 6 | np.int64(data[at + 2] & 0x3F)
    return (lead & 0x07) << 18 | low << 6 | np.int64(data[at + 3] & 0x3F), 4


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
    """Encode lines of `data` from state[BYTE] on; return DONE, NEEDS_PAGE or NEEDS_LIBRARY.

    data: uint8 [bytes], valid UTF-8. ids [>= bytes] takes token ids, with the bit `continues` on
    pieces that continue a word; starts uint32 [>= bytes] the character at which each token begins,
    counted from the start of `data`; line_lengths int64 [lines] tokens a line. `state` says how far
    all of them are filled, at the start of a line.
    """
    word = np.empty(MAX_WORD_CHARS + 1, dtype=np.int64)
    word_starts = np.empty(MAX_WORD_CHARS + 1, dtype=np.uint32)
    at, num_tokens, char = state[BYTE], state[TOKEN], state[CHAR]
    while at < len(data):
        length = 0
        while at < len(data) and data[at] != 10:
            code_point, num_bytes = _decode(data, at)
            entry = entries[code_point]
            kind, payload = entry >> _KIND_SHIFT, np.int64(entry & _PAYLOAD_MASK)
            if kind == _ISOLATED:
                if length:
                    num_tokens = _emit_word(
                        word, word_starts, length, trie, unk_id, continues, ids, starts, num_tokens
                    )
                    length = 0
                ids[num_tokens] = payload
                starts[num_tokens] = char
                num_tokens += 1
            elif kind == _ORDINARY:
                if length <= MAX_WORD_CHARS:
                    word[length] = payload
                    word_starts[length] = char
                    length += 1
            elif kind == _EXPANDED:
                for i in range(payload + 1, payload + 1 + expansions[payload]):
                    if length <= MAX_WORD_CHARS:
                        word[length] = expansions[i]
                        word_starts[length] = char
                        length += 1
            elif kind == _UNPROBED or kind == _SLOW:
                state[CODE_POINT] = code_point
                return NEEDS_PAGE if kind == _UNPROBED else NEEDS_LIBRARY
            elif kind == _SPACE and length:
                num_tokens = _emit_word(
                    word, word_starts, length, trie, unk_id, continues, ids, starts, num_tokens
                )
                length = 0
            at += num_bytes
            char += 1
        if length:
            num_tokens = _emit_word(
                word, word_starts, length, trie, unk_id, continues, ids, starts, num_tokens
            )
        at += 1
        char += 1
        line_lengths[state[LINE]] = num_tokens - state[TOKEN]
        state[BYTE], state[TOKEN], state[CHAR] = at, num_tokens, char
        state[LINE] += 1
    return DONE
