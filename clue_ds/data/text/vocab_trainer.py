"""Learning a WordPiece vocabulary with the `tokenizers` trainer, the same one each time.

The trainer alone is not deterministic: it numbers `##` characters in the order of a hash table, and
equal counts are then merged in another order. Here words are counted first, the characters are
chosen and ordered by us, and the trainer gets them as given tokens and only merges.

Most words of Chinese text are one character, and those never take part in a merge: only the longer
words are handed to the trainer, so on Chinese the counting is nearly all of the work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import normalizers, pre_tokenizers, trainers
from tokenizers.models import WordPiece

from clue_ds.data.text.wordpiece import MAX_WORD_CHARS

# Of the tokens to learn, at most this share are single characters, and of the rest at most half are
# `##` characters: a corpus has more rare ones than a small vocabulary has room, and each would push
# out a piece that is used more.
MAX_CHARACTER_SHARE = 0.8
_LINES_A_BLOCK = 1000
_WORDS_A_LINE = 1000


def count_words(lines: Iterable[str], lower_case: bool) -> Counter[str]:
    """How often each word occurs after BERT's normalisation and splitting."""
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
    """In order of code points, the `limit` most frequent; of equally frequent ones the first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return sorted(token for token, number in ranked[:limit] if number >= min_frequency)


def train_wordpiece(
    lines: Iterable[str],
    leading_tokens: tuple[str, ...],
    size: int,
    min_frequency: int,
    lower_case: bool,
) -> list[str]:
    """At most `size` tokens: the leading ones, characters, `##` characters, and what merges give.

    Characters and pairs that occur less than `min_frequency` times are left out. Equal lines (in
    any order) give equal tokens.
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
    """Each word as often as it was counted, which is how the trainer takes counts."""
    for word, number in sorted(words.items()):
        for begin in range(0, number, _WORDS_A_LINE):
            yield " ".join([word] * min(_WORDS_A_LINE, number - begin))
