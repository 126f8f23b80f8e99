"""Masking: which tokens are predicted and what replaces them, as a pure function of their place.

Every draw is a hash of (seed, epoch, sample, number), so masks are the same on any rank and after
any resume, and new in each epoch. A row of L tokens ([CLS] and [SEP] included) gets exactly
n(L) = min(P, ceil(mask_prob * L)) predictions if it has that many maskable tokens: P slots per row
are a static shape, and a full row fills them all. [CLS], [SEP] and [UNK] are not maskable; [UNK]
stands for any of many characters, so nothing can be learned from predicting it.

Tokens, or whole words, are drawn without replacement, all equally likely, until n is reached, so
the work is per prediction, not per token. A word that is longer than what is left of n is passed
over. If all words have been drawn before n is reached, the words that were passed over give their
leading tokens, the first of them first. So the count is exact and at most one word is cut. The
price, measured at length 128: a word of one token is masked in 17% of cases, one of four in 14%.
Cutting the first word that does not fit would treat all lengths alike, but would cut a word in four
rows of ten.

n-grams: the text is first cut into runs of 1 to `max_ngram` words (or tokens), a run of k with
probability proportional to 1/k, and these runs are drawn as words are. No run crosses a [SEP].

A chosen token becomes [MASK] in 80% of cases, stays as it is in 10%, and becomes a uniformly drawn
ordinary token (not special, not [unused]) in 10%, decided for each token by itself, as in BERT.

Rejected: independent draws with probability 0.15, as the usual collator makes them (the number of
predictions varies, so the head needs dynamic shapes); masks made once, when the corpus is prepared
(every epoch would have the same).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled, inlined
from clue_ds.data.sampling import IGNORED_LABEL

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Counters under the key of a row: from 0 the lengths of n-grams and from _OUTCOMES the outcomes, by
# position; from _DRAWS the draws.
_OUTCOMES, _DRAWS = np.uint64(1 << 32), np.uint64(1 << 33)
_NGRAM_BITS = np.uint64(0xFFFF)
_TEN = np.uint64(10)
_NUM_MASKED, _KEPT = np.uint64(8), np.uint64(8)  # of 10 outcomes, 0 to 7 mask, 8 keeps
_ZERO, _ONE = np.uint64(0), np.uint64(1)
# Finds the number of the only bit that is set in a word: the top six bits of the word's product
# with this constant are different for each of the 64 bits.
_DE_BRUIJN, _TOP_SIX = np.uint64(0x03F79D71B4CB0A89), np.uint64(58)
_BIT_NUMBERS = np.argsort(_DE_BRUIJN << np.arange(64, dtype=np.uint64) >> _TOP_SIX)


class MaskTable(NamedTuple):
    """The options of masking, in the form in which the compiled code reads them."""

    continues: int  # bit of a token that continues its word
    whole_word: bool
    ngram_draws: np.ndarray  # uint64 [max_ngram - 1]: 16-bit draws from here on add a word
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
    """Replace begins[:num], where words begin, by where runs of words begin; their number."""
    num_runs = 0
    words_left = 0  # further words that the current run takes
    for word in range(num):
        begin = begins[word]
        token = np.int64(row[begin])
        is_special = token == table.sep_id or token == table.cls_id
        if words_left > 0 and not is_special:
            words_left -= 1
            continue
        # A new run: the last one is complete, or a special token ended it.
        begins[num_runs] = begin
        num_runs += 1
        draw = derive(row_key, np.uint64(begin - 1)) & _NGRAM_BITS
        words_left = 0 if is_special else _further_words(draw, table.ngram_draws)
    return num_runs


@inlined
def _find_units(
    row: np.ndarray, length: int, row_key: np.uint64, table: MaskTable, begins: np.ndarray
) -> int:
    """Fill begins with where units (words, tokens or n-grams) begin, then their end; their number.

    A special token inside the row is a unit of its own, of which nothing is maskable.
    """
    marks = table.continues if table.whole_word else 0
    # Without a branch, which the processor could not predict: every position is written, and the
    # next one overwrites it unless a unit begins here. An unsigned index needs no check for
    # counting from the end.
    num = _ZERO
    for i in range(1, length - 1):
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
    """Choose up to `limit` of the first maskable tokens not chosen yet; return their number."""
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
    """Choose `goal` tokens: draw units without replacement while they fit, then cut one."""
    for unit in range(num):
        order[unit] = unit
    left = goal
    for i in range(num):
        if left == 0:
            return
        # A Fisher-Yates shuffle, made only as far as needed: order[:i] are the units drawn so far,
        # and unit i is drawn from the others.
        draw = derive(row_key, _DRAWS + np.uint64(i)) >> _HALF
        place = i + np.int64((draw * np.uint64(num - i)) >> _HALF)
        unit = order[place]
        order[place] = order[i]
        order[i] = unit
        begin, end = begins[unit], begins[unit + 1]
        # Count the unit's maskable tokens. A `for` would become a vector loop, which is slow for
        # one or two tokens.
        size, k = 0, begin
        while k < end and size <= left:
            size += _is_maskable(np.int64(row[k]), table)
            k += 1
        if size <= left:
            left -= _choose(row, begin, end, size, table, chosen)
    # All units were drawn and some tokens are still missing: take them from the units that were
    # passed over, in the order in which they were drawn. Only the last one can be cut.
    for i in range(num):
        if left == 0:
            return
        unit = order[i]
        left -= _choose(row, begins[unit], begins[unit + 1], left, table, chosen)


@inlined
def _outcome(row_key: np.uint64, i: int, token: int, table: MaskTable) -> int:
    """The token that replaces a chosen token; position i counts from the first one after [CLS]."""
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
    """Write masked and padded rows, with predictions in order of position.

    rows uint16 or uint32 [B, S]: tokens with word marks, from the first [CLS] to the last [SEP]; a
    token that follows a special token has no mark. lengths int64 [B]: the tokens of each row.
    epochs, samples uint64 [B]: what the hashes depend on. Fills input_ids int64 [B, S],
    masked_positions and masked_labels int64 [B, P].
    """
    width = rows.shape[1]
    begins, order = np.empty(width + 1, np.int64), np.empty(width, np.int64)
    chosen = np.empty((width + 63) // 64, np.uint64)  # one bit per position
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
        # Walk over the bits that are set, lowest first: predictions come in order of position, and
        # the work is per prediction.
        slot = 0
        for group in range(len(chosen)):
            bits = chosen[group]
            while bits != _ZERO:
                lowest = bits & (~bits + _ONE)  # the lowest bit alone
                bits ^= lowest
                i = group * 64 + _BIT_NUMBERS[(lowest * _DE_BRUIJN) >> _TOP_SIX]
                token = input_ids[b, i]
                masked_positions[b, slot] = i
                masked_labels[b, slot] = token
                input_ids[b, i] = _outcome(row_key, i - 1, token, table)
                slot += 1
        masked_positions[b, slot:] = 0
        masked_labels[b, slot:] = IGNORED_LABEL
