"""Masking: which tokens are hidden, and behind what, as a pure function of where they are.

Every decision about a token is a hash of (seed, epoch, sample, position), so masks are the same on
any rank and after any resume, and new in each epoch. A sequence of L tokens ([CLS] and [SEP]
included) gets exactly n(L) = min(P, ceil(mask_prob * L)) predictions whenever it has that many
maskable tokens: P slots a row are a static shape, and a full row fills them all. Not maskable are
[CLS], [SEP] and [UNK], which stands for many characters and teaches none.

Per token: the n tokens with the smallest hashes. Whole word: words by the hash of their first
position; a word that does not fit into what is left is passed over, and if all words are used up
before n is reached, the first words passed over give their leading tokens. So the count is exact
and at most one word is cut. The price, measured at length 128: a word of one token is hidden in
17 % of cases, one of four in 14 %. Cutting the first word that does not fit would treat all
lengths alike, but would cut a word in four rows of ten.

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

IGNORED_LABEL = -100
NUM_BUCKETS = 256
_BUCKET_SHIFT = np.uint64(56)
_UNIT_MASK = np.uint64(0xFFFF)  # a sort key's low bits number the unit; the hash's draw its length
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# Counters of the second hash of a position lie behind those of the first.
_OUTCOMES = np.uint64(1 << 32)
_TEN = np.uint64(10)
_NUM_MASKED, _KEPT = np.uint64(8), np.uint64(8)  # of 10 outcomes, 0 to 7 mask, 8 keeps


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
    has_inner_specials: bool  # a row may hold several sequences, or two segments


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
def _add_units(
    row: np.ndarray,
    first: int,
    last: int,
    row_key: np.uint64,
    table: MaskTable,
    begins: np.ndarray,
    sizes: np.ndarray,
    keys: np.ndarray,
    num: int,
) -> int:
    """Add the units of positions first to last - 1, which hold text only; how many there are now.

    A unit is a word (a token, an n-gram): where it begins, maskable tokens, sort key.
    """
    id_mask = table.continues - 1
    draws = table.ngram_draws
    has_ngrams = len(draws) > 0
    words_left = 0  # further words that the unit at hand takes
    for i in range(first, last):
        if not (table.whole_word and row[i] & table.continues):
            if words_left > 0:
                words_left -= 1
            else:
                draw = derive(row_key, np.uint64(i - 1))
                begins[num] = i
                sizes[num] = 0
                keys[num] = draw & ~_UNIT_MASK | np.uint64(num)
                num += 1
                if has_ngrams:
                    words_left = _further_words(draw & _UNIT_MASK, draws)
        if np.int64(row[i] & id_mask) != table.unk_id:
            sizes[num - 1] += 1
    return num


@inlined
def _find_units(
    row: np.ndarray,
    length: int,
    row_key: np.uint64,
    table: MaskTable,
    begins: np.ndarray,
    sizes: np.ndarray,
    keys: np.ndarray,
) -> int:
    """Fill begins, sizes and keys with the units between a row's special tokens; how many."""
    num = 0
    if table.has_inner_specials:
        first = 1
        for i in range(1, length):
            token = np.int64(row[i] & (table.continues - 1))
            if token == table.sep_id or token == table.cls_id:
                num = _add_units(row, first, i, row_key, table, begins, sizes, keys, num)
                first = i + 1
    else:
        num = _add_units(row, 1, length - 1, row_key, table, begins, sizes, keys, num)
    begins[num] = length - 1
    return num


@inlined
def _sort(keys: np.ndarray, num: int, ends: np.ndarray, result: np.ndarray) -> None:
    """result[:num] = sorted keys[:num]: by buckets of the top byte, then by insertion."""
    ends[:] = 0
    for i in range(num):
        ends[keys[i] >> _BUCKET_SHIFT] += 1
    for bucket in range(1, NUM_BUCKETS):
        ends[bucket] += ends[bucket - 1]
    for i in range(num - 1, -1, -1):
        bucket = keys[i] >> _BUCKET_SHIFT
        ends[bucket] -= 1
        result[ends[bucket]] = keys[i]
    for i in range(1, num):
        key = result[i]
        place = i
        while place > 0 and result[place - 1] > key:
            result[place] = result[place - 1]
            place -= 1
        result[place] = key


@inlined
def _choose(
    row: np.ndarray,
    unit: int,
    begins: np.ndarray,
    limit: int,
    table: MaskTable,
    chosen: np.ndarray,
) -> int:
    """Mark up to `limit` leading maskable tokens of a unit that aren't yet; return their number.

    The limit is at most the unit's size: what stands behind its last token may be special.
    """
    taken = 0
    for i in range(begins[unit], begins[unit + 1]):
        if taken < limit and np.int64(row[i] & (table.continues - 1)) != table.unk_id:
            chosen[i] = 1
            taken += 1
    return taken


@inlined
def _choose_all(
    row: np.ndarray,
    goal: int,
    order: np.ndarray,
    num: int,
    begins: np.ndarray,
    sizes: np.ndarray,
    table: MaskTable,
    chosen: np.ndarray,
) -> None:
    left = goal
    for i in range(num):
        unit = np.int64(order[i] & _UNIT_MASK)
        if left == 0:
            return
        if sizes[unit] <= left:
            left -= _choose(row, unit, begins, sizes[unit], table, chosen)
            sizes[unit] = 0
    for i in range(num):
        if left == 0:
            return
        unit = np.int64(order[i] & _UNIT_MASK)
        if sizes[unit]:
            left -= _choose(row, unit, begins, left, table, chosen)


@inlined
def _outcome(row_key: np.uint64, i: int, token: int, table: MaskTable) -> int:
    """What stands in the place of a chosen token."""
    draw = derive(row_key, _OUTCOMES + np.uint64(i))
    kind = ((draw >> _HALF) * _TEN) >> _HALF
    if kind < _NUM_MASKED:
        return table.mask_id
    if kind == _KEPT:
        return token
    num = np.uint64(len(table.ordinary_ids))
    return table.ordinary_ids[((draw & _LOW) * num) >> _HALF]


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
    begins, sizes = np.empty(width + 1, np.int64), np.empty(width, np.int64)
    keys, order = np.empty(width, np.uint64), np.empty(width, np.uint64)
    ends = np.empty(NUM_BUCKETS, np.int64)
    chosen = np.empty(width, np.uint8)
    places = np.empty(width + 1, np.int64)
    id_mask = table.continues - 1
    for b in range(rows.shape[0]):
        row = rows[b]
        length = lengths[b]
        row_key = derive(derive(mask_key, epochs[b]), samples[b])
        num = _find_units(row, length, row_key, table, begins, sizes, keys)
        _sort(keys, num, ends, order)
        chosen[:] = 0
        _choose_all(row, table.goals[length], order, num, begins, sizes, table, chosen)
        # Whether a position is chosen can't be predicted, so nothing branches on it: a plain copy,
        # then a list of the chosen positions, then their outcomes.
        num_chosen = 0
        for i in range(length):
            input_ids[b, i] = row[i] & id_mask
            places[num_chosen] = i
            num_chosen += chosen[i]
        for slot in range(num_chosen):
            i = places[slot]
            token = input_ids[b, i]
            masked_positions[b, slot] = i
            masked_labels[b, slot] = token
            input_ids[b, i] = _outcome(row_key, i - 1, token, table)
        input_ids[b, length:] = table.pad_id
        masked_positions[b, num_chosen:] = 0
        masked_labels[b, num_chosen:] = IGNORED_LABEL
