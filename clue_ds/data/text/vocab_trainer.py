"""Learning a WordPiece vocabulary with the trainer of `tokenizers`, with the same result each time.

The trainer alone is not deterministic: it numbers `##` characters in the order of a hash table, and
then merges pairs with equal counts in another order. So this module counts the words, chooses the
characters and orders them, and gives them to the trainer as special tokens; the trainer only
merges.

Most words of Chinese text have one character and take no part in any merge. Only the longer words
are given to the trainer, so for Chinese text counting is nearly all of the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece

from clue_ds.data.text.wordpiece import MAX_WORD_CHARS

# At most this share of the tokens to learn are single characters, and at most half of the rest are
# `##` characters. A corpus has more rare characters than a small vocabulary can hold, and each
# would take the place of a longer token that is used more.
MAX_CHARACTER_SHARE = 0.8
_LINES_A_BLOCK = 1000
_WORDS_A_LINE = 1000


def count_words(lines: Iterable[str], lower_case: bool) -> Counter[str]:
    """How often each word occurs, after BERT's normalisation and splitting into words."""
    normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    spaced: Counter[str] = Counter()
    for block in _blocks(lines):
        spaced.update(normalizer.normalize_str(block).split())
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    words: Counter[str] = Counter()
    for text, number in spaced.items():
        for word, _ in split(text):
            words[word] += number
    return words


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    for line in lines:
        block.append(line)
        if len(block) == _LINES_A_BLOCK:
            yield "\n".join(block)
            block = []
    yield "\n".join(block)


def _most_frequent(counts: Counter[str], limit: int, min_frequency: int) -> list[str]:
    """The `limit` most frequent keys, sorted; of equally frequent ones the first are taken."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return sorted(token for token, number in ranked[:limit] if number >= min_frequency)


def train_wordpiece(
    lines: Iterable[str],
    leading_tokens: tuple[str, ...],
    size: int,
    min_frequency: int,
    lower_case: bool,
) -> list[str]:
    """At most `size` tokens: leading tokens, characters, `##` characters, then merged pieces.

    Characters and pairs that occur less often than `min_frequency` are left out. Equal lines, in
    any order, give equal tokens.
    """
    words = count_words(lines, lower_case)
    characters: Counter[str] = Counter()
    inner: Counter[str] = Counter()
    for word, number in words.items():
        for place, character in enumerate(word):
            characters[character] += number
            if place:
                inner[f"##{character}"] += number
    room = size - len(leading_tokens)
    given = _most_frequent(characters, int(room * MAX_CHARACTER_SHARE), min_frequency)
    given += _most_frequent(inner, (room - len(given)) // 2, min_frequency)
    known = set(given)
    mergeable = {
        word: number
        for word, number in words.items()
        if 1 < len(word) <= MAX_WORD_CHARS
        and known.issuperset(word)
        and known.issuperset(f"##{character}" for character in word[1:])
    }
    trainee = tokenizers.Tokenizer(WordPiece(unk_token="[UNK]"))
    trainee.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        limit_alphabet=len(known),
        special_tokens=[*leading_tokens, *given],
        show_progress=False,
    )
    trainee.train_from_iterator(_repeated(mergeable), trainer)
    return sorted(trainee.get_vocab(), key=trainee.get_vocab().__getitem__)


def _repeated(words: dict[str, int]) -> Iterator[str]:
    """Each word as often as it was counted, because the trainer takes no counts."""
    for word, number in sorted(words.items()):
        for begin in range(0, number, _WORDS_A_LINE):
            yield " ".join([word] * min(_WORDS_A_LINE, number - begin))
