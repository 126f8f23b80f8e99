"""Vocabularies: reading vocab.txt, learning one from text, slimming one by CLUE's rule.

A vocabulary is a text file with one token a line; a token's id is its line, from 0. Learning is
left to the `tokenizers` library's WordPiece trainer (vocab_trainer.py says how); special tokens are
laid out as in Google's Chinese list, so that [PAD] is 0 and [UNK], [CLS], [SEP], [MASK] are 100 to
103 in every vocabulary of this project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import tyro

from clue_ds import files
from clue_ds.data.text.choices import InputFormat
from clue_ds.data.text.clue_vocab import slim_vocab
from clue_ds.data.text.decode import read_lines
from clue_ds.data.text.inputs import resolve
from clue_ds.data.text.special_tokens import LEADING_TOKENS
from clue_ds.errors import UserError
from clue_ds.vocab_file import check_special_tokens, vocab_lines


def read_vocab(path: str | Path) -> list[str]:
    """The tokens of a vocab.txt in the order of their ids; UserError if BERT can't use it."""
    tokens = vocab_lines(path)
    check_special_tokens(tokens, path)
    for number, token in enumerate(tokens, start=1):
        if not token:
            raise UserError(f"vocabulary {path} has an empty line {number}; remove it")
    return tokens


def write_vocab(tokens: list[str], path: Path) -> None:
    """Write one token a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(f"{token}\n" for token in tokens))


def learn(
    inputs: tyro.conf.Positional[tuple[str, ...]],
    /,
    output: Path,
    size: int = 8021,
    min_frequency: int = 2,
    lower_case: bool = True,
    t2s: bool = False,
    format: InputFormat = "auto",
    text_field: str = "text",
) -> None:
    """Learn a WordPiece vocabulary from text and write it as vocab.txt.

    The inputs are those of `clue-ds shard`: UTF-8 text, .jsonl, .parquet (each also as .gz or
    .zst), globs in quotes, hf:NAME for a Hugging Face data set, - for standard input. The result
    depends on nothing but the text and these options. Some hundred megabytes of varied text are
    enough (about 7 MB/s).

    Args:
        inputs: files, globs, hf:NAME or -
        output: the vocab.txt to write
        size: most tokens it may have, the 104 special and unused ones included
        min_frequency: a character, or a pair of pieces, that is rarer gets no token
        lower_case: lower-case the text and remove accents, as BERT does
        t2s: convert traditional characters to simplified ones first (OpenCC)
        format: what the inputs are; auto goes by the file name
        text_field: the column or key that holds the text, for jsonl, parquet and hf:
    """
    if size <= len(LEADING_TOKENS):
        raise UserError(
            f"--size {size} leaves no room beside the {len(LEADING_TOKENS)} special tokens; "
            "8021 is CLUE's size, 21128 Google's"
        )
    # Not for those who only read a vocabulary: it brings numba.
    from clue_ds.data.text.vocab_trainer import train_wordpiece

    sources = resolve(inputs, format)
    lines = _converted(read_lines(sources, text_field), t2s)
    tokens = train_wordpiece(lines, LEADING_TOKENS, size, min_frequency, lower_case)
    if len(tokens) <= len(LEADING_TOKENS):
        raise UserError(
            f"nothing to learn from in {', '.join(inputs)}: no character "
            f"occurs --min-frequency {min_frequency} times"
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


def _converted(lines: Iterator[str], t2s: bool) -> Iterator[str]:
    if not t2s:
        return lines
    import opencc

    return map(opencc.OpenCC("t2s").convert, lines)


def clue(source: tyro.conf.Positional[Path], /, output: Path) -> None:
    """Slim a Chinese BERT vocabulary by CLUE's rule: Google's 21,128 tokens become 8,021.

    Keeps simplified characters, English letters and pieces, digits, frequent numbers and special
    tokens; drops traditional characters, ## Han pieces, kana, Hangul, emoji and English words.

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
