"""Compiled code that finds the text of sample i of a corpus and writes it into a row.

Where a window begins is a multiplication. All other kinds follow sentence and document ends, so
where sample i begins depends on all samples before it in its shard: `index_shard` walks over the
shard's tables and returns the place of every 64th sample (sample_index.py keeps them). A sample is
then found by walking on from the last place before it, 32 samples on average. Samples are numbered
along the text, so a range of samples is a range of the file.

B: rows   S: positions   D: sequences that a row may hold
"""

from __future__ import annotations

import numpy as np

from clue_ds.data.counter_rng import derive
from clue_ds.data.jit import compiled, inlined
from clue_ds.data.sampling import IGNORED_LABEL
from clue_ds.data.stream.pointers import mapped
from clue_ds.data.stream.tables import Frame, Index, MappedCorpus

# Kinds of samples as compiled code knows them.
SENTENCES, DOCUMENTS, PACKED = 0, 1, 2
WALKS = {"sentences": SENTENCES, "documents": DOCUMENTS, "packed": PACKED}

STRIDE = 64
# A random partner is at most this many samples away: its pages were or will be read anyway.
PARTNER_WINDOW = 4096
NUM_PARTNER_DRAWS = 8
_COIN, _SPLIT, _PARTNERS = np.uint64(0), np.uint64(1), np.uint64(2)
_HALF = np.uint64(32)
_ONE = np.uint64(1)


# ------------------------------------------------------------------------------- where samples are


@inlined
def _span(
    sentence_ends: np.ndarray, token: int, sentence: int, stop: int, width: int
) -> tuple[int, int]:
    """The longest span of whole sentences from `token` on, before `stop`, that fits into `width`.

    Returns the token and the sentence behind the span.
    """
    after = sentence
    while after < stop and sentence_ends[after] <= token + width:
        after += 1
    if after > sentence:
        return np.int64(sentence_ends[after - 1]), after
    # The first sentence alone is too long: it is cut, and the next span goes on inside it.
    return token + width, sentence


@inlined
def _next(
    kind: int,
    sentence_ends: np.ndarray,
    document_ends: np.ndarray,
    token: int,
    sentence: int,
    document: int,
    width: int,
    ends: np.ndarray,
) -> tuple[int, int, int, int]:
    """The sample that begins at `token`: (sequences in it; token, sentence, document behind it).

    Sequence i ends before token ends[i], where sequence i + 1 begins. `width` is the number of
    tokens that a row has room for; in a PACKED row it includes [CLS] and [SEP] of each sequence.
    """
    # index_shard and _find both walk by calling this, so they agree on where samples begin. What it
    # returns may only depend on the text from `token` on.
    if kind == SENTENCES:
        token, sentence = _span(sentence_ends, token, sentence, len(sentence_ends), width)
        ends[0] = token
        return 1, token, sentence, document
    if kind == DOCUMENTS:
        stop = np.int64(document_ends[document])
        token, sentence = _span(sentence_ends, token, sentence, stop, width)
        ends[0] = token
        return 1, token, sentence, document + (sentence == stop)
    # A packed row: documents are added while the next one fits.
    num = 0
    room = width
    while num < len(ends) and document < len(document_ends) and room > 2:
        stop = np.int64(document_ends[document])
        left = np.int64(sentence_ends[stop - 1]) - token
        if left + 2 <= room:
            end, after = token + left, stop
        elif num and left + 2 <= width:
            break  # what is left of the document fits whole into the next row
        else:
            end, after = _span(sentence_ends, token, sentence, stop, room - 2)
            if num and after == sentence:
                break  # no whole sentence of it fits: a sentence is only cut at a row's start
        room -= end - token + 2
        token, sentence = end, after
        document += sentence == stop
        ends[num] = token
        num += 1
    return num, token, sentence, document


@compiled
def index_shard(
    kind: int, width: int, num_sequences: int, sentence_ends: np.ndarray, document_ends: np.ndarray
) -> tuple[int, np.ndarray]:
    """The number of samples in a shard, and where every 64th one begins.

    The places are uint32 [M, 3]: token, sentence and document.
    """
    num_tokens = np.int64(sentence_ends[-1])
    ends = np.empty(num_sequences, np.int64)
    # Each sample ends at a sentence end or is full, which bounds their number.
    most = len(sentence_ends) + num_tokens // width + 1
    marks = np.empty((most // STRIDE + 1, 3), np.uint32)
    num, token, sentence, document = 0, np.int64(0), np.int64(0), np.int64(0)
    while token < num_tokens:
        if num % STRIDE == 0:
            mark = marks[num // STRIDE]
            mark[0], mark[1], mark[2] = token, sentence, document
        _, token, sentence, document = _next(
            kind, sentence_ends, document_ends, token, sentence, document, width, ends
        )
        num += 1
    return num, marks[: (num + STRIDE - 1) // STRIDE].copy()


@inlined
def _find(
    kind: int,
    corpus: MappedCorpus,
    index: Index,
    width: int,
    sample: int,
    shard: int,
    ends: np.ndarray,
) -> tuple[int, int, int, int]:
    """(Sequences in it; first token, sentence, document) of a sample; fills ends as _next does."""
    # Marks hold three numbers each. Start at the last mark that is not behind the sample.
    place = sample - index.first_samples[shard]
    at = place // STRIDE * 3
    marks = mapped(index.marks[shard], at + 3, index.like)
    token, sentence = np.int64(marks[at]), np.int64(marks[at + 1])
    document = np.int64(marks[at + 2])
    sentences = mapped(corpus.sentence_ends[shard], corpus.num_sentences[shard], index.like)
    documents = mapped(corpus.document_ends[shard], corpus.num_documents[shard], index.like)
    # Walk over the samples in between, up to STRIDE - 1 of them.
    for _ in range(place % STRIDE):
        _, token, sentence, document = _next(
            kind, sentences, documents, token, sentence, document, width, ends
        )
    # Once more for the sample itself, whose ends are wanted.
    num, _, _, _ = _next(kind, sentences, documents, token, sentence, document, width, ends)
    return num, token, sentence, document


# ------------------------------------------------------------------------------------ rows of text


@inlined
def _shard_of(sample: int, first_samples: np.ndarray) -> int:
    return np.searchsorted(first_samples, sample, side="right") - 1


@inlined
def _put(row: np.ndarray, at: int, tokens: np.ndarray, begin: int, end: int, frame: Frame) -> int:
    """Write tokens, the first one without its word mark, and a [SEP]; the position behind it."""
    # Slices that both begin at 0: LLVM turns this loop into vector instructions.
    text, place = tokens[begin:end], row[at : at + end - begin]
    for i in range(len(place)):
        place[i] = text[i]
    if end > begin:
        row[at] &= frame.id_mask
    row[at + end - begin] = frame.sep_id
    return at + end - begin + 1


@compiled
def fill_windows(
    samples: np.ndarray,
    corpus: MappedCorpus,
    first_samples: np.ndarray,
    frame: Frame,
    rows: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Write windows of S - 2 tokens, `samples` uint64 [B], into rows [B, S], lengths int64 [B]."""
    window = rows.shape[1] - 2
    for b in range(rows.shape[0]):
        sample = np.int64(samples[b])
        shard = _shard_of(sample, first_samples)
        tokens = mapped(corpus.tokens[shard], corpus.num_tokens[shard], rows)
        begin = (sample - first_samples[shard]) * window
        end = min(begin + window, corpus.num_tokens[shard])
        rows[b, 0] = frame.cls_id
        lengths[b] = _put(rows[b], 1, tokens, begin, end, frame)


@compiled
def fill_sequences(
    kind: int,
    samples: np.ndarray,
    corpus: MappedCorpus,
    index: Index,
    frame: Frame,
    rows: np.ndarray,
    lengths: np.ndarray,
    cu_seqlens: np.ndarray,
) -> None:
    """Write samples of any kind into rows [B, S], each sequence as [CLS] ... [SEP].

    cu_seqlens int64 [B, D + 1]: where sequences begin; all further entries are the row's length.
    """
    width = rows.shape[1] - (0 if kind == PACKED else 2)
    ends = np.empty(cu_seqlens.shape[1] - 1, np.int64)
    for b in range(rows.shape[0]):
        sample = np.int64(samples[b])
        shard = _shard_of(sample, index.first_samples)
        tokens = mapped(corpus.tokens[shard], corpus.num_tokens[shard], rows)
        num, begin, _, _ = _find(kind, corpus, index, width, sample, shard, ends)
        at = 0
        for i in range(num):
            cu_seqlens[b, i] = at
            rows[b, at] = frame.cls_id
            at = _put(rows[b], at + 1, tokens, begin, ends[i], frame)
            begin = ends[i]
        cu_seqlens[b, num:] = at
        lengths[b] = at


# ------------------------------------------------------------------------------------------- pairs


@inlined
def _below(draw: np.uint64, num: int) -> int:
    return np.int64(((draw >> _HALF) * np.uint64(num)) >> _HALF)


@inlined
def _num_inner_ends(sentence_ends: np.ndarray, sentence: int, end: int) -> int:
    """Sentence ends inside a span that begins in `sentence` and ends before token `end`."""
    after = sentence
    while sentence_ends[after] < end:
        after += 1
    return after - sentence


@inlined
def _split(
    tokens: np.ndarray,
    sentence_ends: np.ndarray,
    sentence: int,
    begin: int,
    end: int,
    draw: np.uint64,
    bit: int,
) -> int:
    """Where a span is split into A and B: at one of its inner sentence ends, all equally likely.

    A span of one sentence is split where the first word behind its middle begins, or else the last
    one before it. Returns `end` for a span that is a single word.
    """
    num = _num_inner_ends(sentence_ends, sentence, end)
    if num:
        return np.int64(sentence_ends[sentence + _below(draw, num)])
    middle = (begin + end + 1) // 2
    for at in range(middle, end):
        if not tokens[at] & bit:
            return at
    for at in range(middle - 1, begin, -1):
        if not tokens[at] & bit:
            return at
    return end


@inlined
def _partner(
    corpus: MappedCorpus,
    index: Index,
    width: int,
    sample: int,
    shard: int,
    document: int,
    key: np.uint64,
    ends: np.ndarray,
) -> tuple[int, int]:
    """(begin, end) of text from a random sentence of another document, or (0, 0) without one.

    It comes from the same PARTNER_WINDOW samples of the shard as this sample.
    """
    first = index.first_samples[shard]
    low = first + (sample - first) // PARTNER_WINDOW * PARTNER_WINDOW
    num = min(low + PARTNER_WINDOW, index.first_samples[shard + 1]) - low
    sentences = mapped(corpus.sentence_ends[shard], corpus.num_sentences[shard], index.like)
    for attempt in range(NUM_PARTNER_DRAWS):
        draw = derive(key, _PARTNERS + np.uint64(2 * attempt))
        other = low + _below(draw, num)
        _, begin, sentence, where = _find(DOCUMENTS, corpus, index, width, other, shard, ends)
        # Draws that all meet the same document leave the sample its true B.
        if where == document:
            continue
        # B begins at a random sentence of that sample, so that it isn't always a document's first.
        end = ends[0]
        skipped = _below(
            derive(key, _PARTNERS + np.uint64(2 * attempt + 1)),
            _num_inner_ends(sentences, sentence, end) + 1,
        )
        return (np.int64(sentences[sentence + skipped - 1]) if skipped else begin), end
    return np.int64(0), np.int64(0)


@compiled
def fill_pairs(
    samples: np.ndarray,
    epochs: np.ndarray,
    pair_key: np.uint64,
    swaps: bool,
    corpus: MappedCorpus,
    index: Index,
    frame: Frame,
    rows: np.ndarray,
    lengths: np.ndarray,
    token_type_ids: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Write [CLS] A [SEP] B [SEP] into rows [B, S]; token_type_ids int64 [B, S]; labels int64 [B].

    A and B are a span of a document, split in two. In half of the cases, which are labelled 1, they
    are swapped (with `swaps`), or B comes from another document and loses the end that doesn't fit.
    """
    width = rows.shape[1] - 3
    bit = frame.id_mask + 1
    ends = np.empty(1, np.int64)
    for b in range(rows.shape[0]):
        sample = np.int64(samples[b])
        shard = _shard_of(sample, index.first_samples)
        tokens = mapped(corpus.tokens[shard], corpus.num_tokens[shard], rows)
        sentences = mapped(corpus.sentence_ends[shard], corpus.num_sentences[shard], index.like)
        _, begin, sentence, document = _find(DOCUMENTS, corpus, index, width, sample, shard, ends)
        end = ends[0]
        key = derive(derive(pair_key, epochs[b]), samples[b])
        cut = _split(tokens, sentences, sentence, begin, end, derive(key, _SPLIT), bit)
        # The true pair, unless the coin decides otherwise; a span of a single word has no B.
        a, a_end, b_begin, b_end = begin, cut, cut, end
        labels[b] = 0 if cut < end else IGNORED_LABEL
        if derive(key, _COIN) & _ONE:
            if not swaps:
                begin, end = _partner(corpus, index, width, sample, shard, document, key, ends)
                if begin < end:
                    b_begin, b_end = begin, min(end, begin + width - (a_end - a))
                    labels[b] = 1
            elif cut < end:
                a, a_end, b_begin, b_end = cut, end, begin, cut
                labels[b] = 1
        rows[b, 0] = frame.cls_id
        middle = _put(rows[b], 1, tokens, a, a_end, frame)
        lengths[b] = _put(rows[b], middle, tokens, b_begin, b_end, frame)
        token_type_ids[b, :middle] = 0
        token_type_ids[b, middle : lengths[b]] = 1
        token_type_ids[b, lengths[b] :] = 0
