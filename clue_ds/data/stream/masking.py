"""Masking: which tokens are hidden, and behind what, as a pure function of where they are.

Every draw is a hash of (seed, epoch, sample, number), so masks are the same on any rank and after
any resume, and new in each epoch. A sequence of L tokens ([CLS] and [SEP] included) gets exactly
n(L) = min(P, ceil(mask_prob * L)) predictions whenever it has that many maskable tokens: P slots a
row are a static shape, and a full row fills them all. Not maskable are [CLS], [SEP] and [UNK],
which stands for many characters and teaches none.

Tokens, or whole words, are drawn without replacement, all equally likely, until n is reached: work
for each prediction, not for each token. A word that does not fit into what is left is passed over,
and if all words are used up before n is reached, the first words passed over give their leading
tokens. So the count is exact and at most one word is cut. The price, measured at length 128: a word
of one token is hidden in 17 % of cases, one of four in 14 %. Cutting the first word that does not
fit would treat all lengths alike, but would cut a word in four rows of ten.

n-grams: the text is first cut into runs of 1 to `max_ngram` words (or tokens), a run of k with
probability proportional to 1/k, and these are hidden as words are. No run crosses a [SEP].

A chosen token becomes [MASK] in 80 % of cases, stays in 10 %, and becomes a uniformly drawn
ordinary token (not special, not [unused]) in 10 %: each decided by itself, as in BERT.
Rejected: independent draws with probability 0.15 (as the usual collator does), since the number of
predictions then varies and the head needs dynamic shapes; masks made once at preparation (static).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled, inlined
from clue_ds.data.sampling import IGNORED_LABEL

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# What the hashes of a row count: positions (lengths of n-grams, then outcomes), then draws.
_OUTCOMES, _DRAWS = np.uint64(1 << 32), np.uint64(1 << 33)
_NGRAM_BITS = np.uint64(0xFFFF)
_TEN = np.uint64(10)
_NUM_MASKED, _KEPT = np.uint64(8), np.uint64(8)  # of 10 outcomes, 0 to 7 mask, 8 keeps
_ZERO, _ONE = np.uint64(0), np.uint64(1)
# The number of a lone bit: the top six bits of its product with this differ for all 64 bits.
_DE_BRUIJN, _TOP_SIX = np.uint64(0x03F79D71B4CB0A89), np.uint64(58)
_BIT_NUMBERS = np.argsort(_DE_BRUIJN << np.arange(64, dtype=np.uint64) >> _TOP_SIX)


class MaskTable(NamedTuple):
    """The options of masking, in the form in which the compiled code reads them."""

    continues: int  # bit of a token that continues its word
    whole_word: bool
    ngram_draws: np.ndarray  # uint64 [max_ngram - 1]: draws of 16 bits from which a run is longer
    goals: np.ndarray  # int64 [S + 1]: predictions in a sequence of each length
    ordinary_ids: np.ndarray  # int64: what a token may be replaced by
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int


def ngram_draws(max_ngram: int) -> np.ndarray:
    """MaskTable.ngram_draws: P(k words) proportional to 1/k for k = 1 to max_ngram."""
    shares = 1 / np.arange(1, max_ngram + 1)
    return np.ceil((1 << 16) * np.cumsum(shares)[:-1] / shares.sum()).astype(np.uint64)


@inlined
def _further_words(draw: np.uint64, ngram_draws: np.ndarray) -> int:
    num = 0
    while num < len(ngram_draws) and draw >= ngram_draws[num]:
        num += 1
    return num


@inlined
def _join_words(
    row: np.ndarray, num: int, row_key: np.uint64, table: MaskTable, begins: np.ndarray
) -> int:
    """Make begins[:num] of words those of n-grams; how many there are."""
    num_runs = 0
    words_left = 0  # further words that the run at hand takes
    for word in range(num):
        begin = begins[word]
        token = np.int64(row[begin])
        is_special = token == table.sep_id or token == table.cls_id
        if words_left > 0 and not is_special:
            words_left -= 1
            continue
        begins[num_runs] = begin
        num_runs += 1
        draw = derive(row_key, np.uint64(begin - 1)) & _NGRAM_BITS
        words_left = 0 if is_special else _further_words(draw, table.ngram_draws)
    return num_runs


@inlined
def _find_units(
    row: np.ndarray, length: int, row_key: np.uint64, table: MaskTable, begins: np.ndarray
) -> int:
    """Fill begins with where units (words, tokens, n-grams) begin, and their end; how many.

    A special token inside the row is a unit of its own, with nothing that could be hidden.
    """
    marks = table.continues if table.whole_word else 0
    num = _ZERO  # unsigned: no check for an index from the end
    for i in range(1, length - 1):  # no branch: where words begin can't be predicted
        begins[num] = i
        num += np.uint64(row[i] & marks == 0)
    num_units = np.int64(num)
    if len(table.ngram_draws) > 0:
        num_units = _join_words(row, num_units, row_key, table, begins)
    begins[num_units] = length - 1
    return num_units


@inlined
def _is_maskable(token: int, table: MaskTable) -> bool:
    token &= table.continues - 1
    return token != table.unk_id and token != table.sep_id and token != table.cls_id


@inlined
def _choose(
    row: np.ndarray, begin: int, end: int, limit: int, table: MaskTable, chosen: np.ndarray
) -> int:
    """Mark up to `limit` leading maskable tokens that aren't yet; return their number."""
    taken = 0
    for i in range(begin, end):
        bit = _ONE << np.uint64(i & 63)
        if taken < limit and _is_maskable(np.int64(row[i]), table) and not chosen[i >> 6] & bit:
            chosen[i >> 6] |= bit
            taken += 1
    return taken


@inlined
def _choose_units(
    row: np.ndarray,
    goal: int,
    row_key: np.uint64,
    num: int,
    begins: np.ndarray,
    order: np.ndarray,
    table: MaskTable,
    chosen: np.ndarray,
) -> None:
    """Mark `goal` tokens: draw units without replacement, as far as they fit; then cut."""
    for unit in range(num):
        order[unit] = unit
    left = goal
    for i in range(num):
        if left == 0:
            return
        # The first i units are drawn, the others wait behind them.
        draw = derive(row_key, _DRAWS + np.uint64(i)) >> _HALF
        place = i + np.int64((draw * np.uint64(num - i)) >> _HALF)
        unit = order[place]
        order[place] = order[i]
        order[i] = unit
        begin, end = begins[unit], begins[unit + 1]
        size, k = 0, begin
        while k < end and size <= left:  # not `for`: a vector loop is slow for a token or two
            size += _is_maskable(np.int64(row[k]), table)
            k += 1
        if size <= left:
            left -= _choose(row, begin, end, size, table, chosen)
    for i in range(num):
        if left == 0:
            return
        unit = order[i]
        left -= _choose(row, begins[unit], begins[unit + 1], left, table, chosen)


@inlined
def _outcome(row_key: np.uint64, i: int, token: int, table: MaskTable) -> int:
    """What stands in the place of a chosen token."""
    draw = derive(row_key, _OUTCOMES + np.uint64(i))
    kind = ((draw >> _HALF) * _TEN) >> _HALF
    if kind > _KEPT:
        num = np.uint64(len(table.ordinary_ids))
        return table.ordinary_ids[((draw & _LOW) * num) >> _HALF]
    return table.mask_id if kind < _NUM_MASKED else token


@compiled
def mask_rows(
    rows: np.ndarray,
    lengths: np.ndarray,
    epochs: np.ndarray,
    samples: np.ndarray,
    mask_key: np.uint64,
    table: MaskTable,
    input_ids: np.ndarray,
    masked_positions: np.ndarray,
    masked_labels: np.ndarray,
) -> None:
    """Write masked sequences and padding, with predictions in order of position.

    rows uint16 or uint32 [B, S]: marked tokens from the first [CLS] to the last [SEP], and what
    follows a special token has no mark; lengths int64 [B]: how many; epochs, samples uint64 [B]:
    what the hashes depend on. Fills input_ids int64 [B, S], masked_positions and masked_labels
    int64 [B, P].
    """
    width = rows.shape[1]
    begins, order = np.empty(width + 1, np.int64), np.empty(width, np.int64)
    chosen = np.empty((width + 63) // 64, np.uint64)  # a bit a position
    id_mask = table.continues - 1
    for b in range(rows.shape[0]):
        row = rows[b]
        length = lengths[b]
        row_key = derive(derive(mask_key, epochs[b]), samples[b])
        num = _find_units(row, length, row_key, table, begins)
        chosen[:] = 0
        _choose_units(row, table.goals[length], row_key, num, begins, order, table, chosen)
        for i in range(length):
            input_ids[b, i] = row[i] & id_mask
        input_ids[b, length:] = table.pad_id
        slot = 0
        for group in range(len(chosen)):
            bits = chosen[group]
            while bits != _ZERO:
                lowest = bits & (~bits + _ONE)
                bits ^= lowest
                i = group * 64 + _BIT_NUMBERS[(lowest * _DE_BRUIJN) >> _TOP_SIX]
                token = input_ids[b, i]
                masked_positions[b, slot] = i
                masked_labels[b, slot] = token
                input_ids[b, i] = _outcome(row_key, i - 1, token, table)
                slot += 1
        masked_positions[b, slot:] = 0
        masked_labels[b, slot:] = IGNORED_LABEL
