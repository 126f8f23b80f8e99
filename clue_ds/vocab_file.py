"""vocab.txt and the tokenizer_config.json beside it: the format that data and export share.

A vocabulary is UTF-8 text with one token per line; a token's id is its line number, from 0. A leaf,
because `clue_ds.export` may not import `clue_ds.data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clue_ds.errors import UserError, existing_file
from clue_ds.files import read_json

# What every BERT vocabulary must contain.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_CONFIG = "tokenizer_config.json"


def vocab_lines(path: str | Path) -> list[str]:
    """The tokens of a vocab.txt in the order of their ids, without any check of what they are."""
    path = existing_file(path, "vocabulary")
    try:
        tokens = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"vocabulary {path} is not UTF-8 at byte {error.start}; convert it, or give another"
        ) from None
    if tokens[-1] == "":
        tokens.pop()
    return tokens


def check_special_tokens(tokens: Sequence[str], path: str | Path) -> None:
    """UserError when the vocabulary read from `path` lacks one of SPECIAL_TOKENS."""
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(
            f"{path} is not a BERT vocabulary: it lacks {', '.join(missing)}; give a vocab.txt "
            "with one token per line, such as `clue-ds vocab learn` writes"
        )


def lower_case(vocab_file: str | Path) -> bool:
    """do_lower_case of the tokenizer_config.json beside a vocab.txt; True where there is none."""
    path = Path(vocab_file).with_name(TOKENIZER_CONFIG)
    return bool(read_json(path).get("do_lower_case", True)) if path.is_file() else True
