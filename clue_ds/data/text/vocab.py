"""`clue-ds vocab`: learning a vocabulary from text, or slimming one by CLUE's rule.

A vocabulary is a text file with one token per line; the id of a token is the number of its line,
counted from 0. `learn` uses the WordPiece trainer of the `tokenizers` library (vocab_trainer.py)
and puts the special tokens at the ids that they have in Google's Chinese vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import tyro

from clue_ds.data.text.choices import InputFormat, OnError
from clue_ds.data.text.clue_vocab import slim_vocab
from clue_ds.data.text.decode import read_lines
from clue_ds.data.text.sources import resolve
from clue_ds.data.text.special_tokens import LEADING_TOKENS
from clue_ds.errors import UserError
from clue_ds.settings.arguments import PathOrName
from clue_ds.vocab_file import check_special_tokens, vocab_lines, write_tokens


def read_vocab(path: str | Path) -> list[str]:
    """The tokens of a vocabulary in the order of their ids; UserError if BERT can't use it."""
    tokens = vocab_lines(path)
    check_special_tokens(tokens, path)
    return tokens


def write_vocab(tokens: list[str], path: Path) -> None:
    """Write one token per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tokens(tokens, path)


def learn(
    inputs: tyro.conf.Positional[tuple[PathOrName, ...]],
    /,
    output: Path,
    size: int = 8021,
    min_frequency: int = 2,
    lower_case: bool = True,
    t2s: bool = False,
    format: InputFormat = "auto",
    text_field: str = "text",
    on_error: OnError = "refuse",
) -> None:
    """Learn a WordPiece vocabulary from text and write it as vocab.txt.

    It takes the same inputs as `clue-ds shard`: UTF-8 text, jsonl, JSON arrays, csv, tsv and
    parquet, each also compressed or in a zip or tar archive, globs in quotes, hf:NAME for a Hugging
    Face data set, - for standard input.

    The same text and options always give the same vocabulary. A few hundred megabytes of varied
    text are enough; they are read at about 7 MB/s.

    Args:
        inputs: files, globs, hf:NAME or -
        output: the vocab.txt to write
        size: the largest number of tokens, including the 104 special and unused ones
        min_frequency: characters and pairs of pieces that occur less often get no token
        lower_case: lower-case the text and remove accents, as BERT does
        t2s: first convert traditional characters to simplified ones (with OpenCC)
        format: format of the inputs; auto decides by their content and, between texts, their name
        text_field: name of the column or key that holds the text, in JSON, csv, parquet and hf:
        on_error: refuse stops at a bad byte or record and names it; skip leaves it out
    """
    if size <= len(LEADING_TOKENS):
        raise UserError(
            f"--size {size} leaves no room besides the {len(LEADING_TOKENS)} special and unused "
            "tokens; CLUE's vocabulary has 8021 tokens, Google's 21128"
        )
    # Imports numba, which code that only reads a vocabulary doesn't need.
    from clue_ds.data.text.vocab_trainer import train_wordpiece

    sources = resolve(inputs, format)
    lines = _converted(read_lines(sources, text_field, on_error), t2s)
    tokens = train_wordpiece(lines, LEADING_TOKENS, size, min_frequency, lower_case)
    if len(tokens) <= len(LEADING_TOKENS):
        raise UserError(
            f"there is nothing to learn from in {', '.join(inputs)}: no character occurs "
            f"at least {min_frequency} times; give more text, or lower --min-frequency"
        )
    write_vocab(tokens, output)
    learned = tokens[len(LEADING_TOKENS) :]
    num_pieces = sum(token.startswith("##") for token in learned)
    num_characters = sum(len(token) == 1 for token in learned)
    print(
        f"{output}: {len(tokens):,} tokens: {len(LEADING_TOKENS)} special and unused, "
        f"{num_characters:,} characters, {num_pieces:,} ## pieces, "
        f"{len(learned) - num_characters - num_pieces:,} longer words"
    )
    if len(tokens) < size:
        print(
            f"note: these are all; the text has no more characters and pieces that occur at least "
            f"{min_frequency} times, so --size {size:,} was not reached. Nothing is wrong with a "
            "smaller vocabulary; for a larger one give more text, or lower --min-frequency"
        )


def _converted(lines: Iterator[str], t2s: bool) -> Iterator[str]:
    if not t2s:
        return lines
    import opencc

    return map(opencc.OpenCC("t2s").convert, lines)


def clue(source: tyro.conf.Positional[Path], /, output: Path) -> None:
    """Slim a Chinese BERT vocabulary by CLUE's rule: Google's 21,128 tokens become 8,021.

    It keeps simplified characters, English letters and ## pieces, digits, frequent numbers and
    special tokens. It drops traditional characters, ## pieces of Han characters, kana, Hangul,
    zhuyin, emoji, English words and other numbers.

    Args:
        source: the vocab.txt to slim
        output: the vocab.txt to write
    """
    slim = slim_vocab(read_vocab(source))
    write_vocab(slim.tokens, output)
    print(f"{output}: {len(slim.tokens):,} tokens")
    print(f"  kept: {_summary(slim.kept)}")
    print(f"  dropped: {_summary(slim.dropped)}")


def _summary(counts: Counter[str]) -> str:
    return ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common())


COMMANDS: dict[str, Callable[..., None]] = {"learn": learn, "clue": clue}
