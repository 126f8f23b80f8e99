"""The vocabulary of a model or a corpus: vocab.txt or tokenizer.json, and tokenizer_config.json.

A vocab.txt is UTF-8 text with one token per line; a token's id is its line number, from 0. A
tokenizer.json, which is all that transformers 5 saves, holds the same tokens with their ids. This
module is a leaf, because `clue_ds.export` may not import `clue_ds.data`.

Guarantees: ids never move. An empty line keeps its id, as a token that no text can be; whatever two
programs would read as different ids or tokens (a byte order mark, an empty last line, a space
beside a token, a carriage return inside a line) is refused with its line. Vocabularies are compared
by their tokens, never by bytes or path.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError, existing_file
from clue_ds.files import PLACEHOLDER_SIZE, read_json, refuse_placeholder, write_text

# What every BERT vocabulary must contain.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCAB_TEXT = "vocab.txt"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Google's multilingual model has 119,547 tokens.
MAX_TOKENS = 1 << 24
UTF8_MARK, UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
# What tokenizer.json must say, so that its tokens are found as BERT's tokenizer finds them.
BERT_PARTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "model": {
        "type": ("WordPiece", None),
        "continuing_subword_prefix": ("##", None),
        "unk_token": ("[UNK]", None),
    },
    "normalizer": {
        "type": ("BertNormalizer",),
        "clean_text": (True, None),
        "handle_chinese_chars": (True, None),
        "lowercase": (True, False, None),
    },
    "pre_tokenizer": {"type": ("BertPreTokenizer",)},
}


def find(directory: str | Path) -> Path:
    """The vocabulary of a model directory: its vocab.txt, or else its tokenizer.json.

    The path of a vocab.txt that does not exist when there is neither.
    """
    text, tokenizer = Path(directory) / VOCAB_TEXT, Path(directory) / TOKENIZER_JSON
    is_there = text.exists() or text.is_symlink()  # a link that leads nowhere is named later
    return tokenizer if tokenizer.is_file() and not is_there else text


def is_text(path: str | Path) -> bool:
    """Whether this vocabulary is a vocab.txt, and not a tokenizer.json."""
    return Path(path).suffix != ".json"


def existing_text(path: str | Path) -> Path:
    """`path` as an existing vocab.txt, which a corpus keeps a copy of; UserError for others."""
    if not is_text(path):
        raise UserError(
            f"{path} is not a vocab.txt; `clue-ds import` of its directory writes one, in the same "
            "order of ids"
        )
    return existing_file(path, "vocabulary")


def vocab_lines(path: str | Path) -> list[str]:
    """The tokens of a vocab.txt or tokenizer.json in the order of their ids.

    UserError with the line where ids or tokens are unclear. Otherwise it is not checked whether
    the special tokens are there.
    """
    path = existing_file(path, "vocabulary")
    tokens = _text_tokens(path) if is_text(path) else _json_tokens(path)
    for number, token in enumerate(tokens, start=1):
        bare = token.strip(" \t")
        if bare and bare != token:
            place = f"line {number}" if is_text(path) else f"id {number - 1}"
            raise UserError(
                f"{place} of vocabulary {path} is {token!r}, with a space beside the token, which "
                f"some programs remove and others keep; write {bare!r} there (no id changes)"
            )
    return tokens


def _text_tokens(path: Path) -> list[str]:
    content = path.read_bytes()
    refuse_placeholder(path, content[:PLACEHOLDER_SIZE])
    if content.startswith(UTF8_MARK):
        raise UserError(
            f"vocabulary {path} begins with a byte order mark (EF BB BF), which would become a "
            "part of its first token; save it as UTF-8 without one, for example with: "
            f"sed -i '1s/^\\xEF\\xBB\\xBF//' {shlex.quote(str(path))}"
        )
    if content.startswith(UTF16_MARKS):
        raise UserError(
            f"vocabulary {path} is UTF-16; convert it with: iconv -f UTF-16 -t UTF-8 "
            f"{shlex.quote(str(path))} > utf8.txt"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"vocabulary {path} is not UTF-8 at byte {error.start}; convert it, or give another"
        ) from None
    tokens = text.replace("\r\n", "\n").split("\n")
    if tokens[-1] == "":
        tokens.pop()
    for number, token in enumerate(tokens, start=1):
        if "\r" in token:
            raise UserError(
                f"line {number} of vocabulary {path} holds a carriage return, at which some "
                "programs end the line and others do not; remove it, or copy the file again"
            )
    if tokens and not tokens[-1].strip(" \t"):
        check_special_tokens(tokens, path)  # advice on ids would mislead who gave another file
        raise UserError(
            f"vocabulary {path} ends with an empty line (line {len(tokens)}), which some programs "
            "count as a token and others do not; if the model has this many words, write "
            "[unused-last] there, and otherwise remove the line. Either way no other id changes"
        )
    return tokens


def _json_tokens(path: Path) -> list[str]:
    """The tokens of a tokenizer.json; an id that it leaves out becomes a token that no text is."""
    values = read_json(path, "vocabulary")
    for part, needed in BERT_PARTS.items():
        _check_part(path, part, values.get(part), needed)
    if _strips_accents(values) != _lowers(values):
        raise _not_bert(path, "normalizer.strip_accents differs from normalizer.lowercase")
    vocab = values["model"].get("vocab")
    if not isinstance(vocab, dict):
        raise _not_bert(path, "model.vocab is not an object of tokens and ids")
    by_id: dict[int, str] = {}
    for token, number in [*vocab.items(), *_added_tokens(path, values)]:
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise UserError(
                f"{path}: token {token!r} has the id {number!r}, which is no id; copy it again"
            )
        if by_id.setdefault(number, token) != token:
            raise UserError(
                f"{path}: {by_id[number]!r} and {token!r} have the same id {number}; copy it again"
            )
        if any(ord(c) in (10, 13) or 0xD800 <= ord(c) < 0xE000 for c in token):
            raise UserError(
                f"{path}: token {token!r} (id {number}) holds a line break or half a character, "
                "which no vocab.txt can hold; use another tokenizer"
            )
    size = max(by_id, default=-1) + 1
    if size > 2 * len(by_id):
        raise UserError(
            f"{path} holds {len(by_id):,} tokens with ids up to {size - 1:,}, so most ids are "
            "missing; copy or download it again"
        )
    return [by_id.get(number, "") for number in range(size)]


def _check_part(path: Path, part: str, values: Any, needed: dict[str, tuple[Any, ...]]) -> None:
    if not isinstance(values, dict):
        raise _not_bert(path, f"it has no {part}" if values is None else f"{part} is no object")
    for key, allowed in needed.items():
        if not any(values.get(key) is value or values.get(key) == value for value in allowed):
            said = json.dumps(values.get(key), ensure_ascii=False)[:60]
            raise _not_bert(path, f"{part}.{key} is {said}, not {json.dumps(allowed[0])}")


def _not_bert(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not the tokenizer of a BERT (WordPiece): {reason}; give a model with a BERT "
        "vocabulary, or put the vocab.txt that it was trained with into its directory"
    )


def _lowers(values: dict[str, Any]) -> bool:
    return values["normalizer"].get("lowercase", True) is not False


def _strips_accents(values: dict[str, Any]) -> bool:
    """BertNormalizer strips accents when it lower-cases, unless it is told otherwise."""
    strips = values["normalizer"].get("strip_accents")
    return _lowers(values) if strips is None else strips is True


def _added_tokens(path: Path, values: dict[str, Any]) -> list[tuple[str, Any]]:
    added = values.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(row, dict) and isinstance(row.get("content"), str) for row in added
    ):
        raise UserError(f"{path}: added_tokens is not a list of tokens; copy it again")
    return [(row["content"], row.get("id")) for row in added]


def check_special_tokens(tokens: Sequence[str], path: str | Path) -> None:
    """UserError when the vocabulary read from `path` lacks one of SPECIAL_TOKENS."""
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(
            f"{path} is not a BERT vocabulary: it lacks {', '.join(missing)}; give a vocab.txt "
            "with one token per line, such as `clue-ds vocab learn` writes"
        )


def write_tokens(tokens: Sequence[str], path: Path) -> None:
    """Write a vocab.txt: one token per line, in the order of the ids."""
    write_text(path, "".join(f"{token}\n" for token in tokens))


def difference(one: Sequence[str], other: Sequence[str]) -> str | None:
    """The first id whose tokens differ, as "id 7 is 'a' there and 'b' here"; None if none does.

    `one` is the vocabulary there, `other` the one here.

    Of a token that stands on several lines only the last id is ever used, so earlier ones count as
    empty, which is what a tokenizer.json makes of them.
    """
    pairs = enumerate(zip(_used(one), _used(other), strict=False))
    found = next(((i, a, b) for i, (a, b) in pairs if a != b), None)
    if found is not None:
        return "id {} is {!r} there and {!r} here".format(*found)
    return None if len(one) == len(other) else f"{len(one):,} tokens there and {len(other):,} here"


def _used(tokens: Sequence[str]) -> list[str]:
    last = {token: number for number, token in enumerate(tokens)}
    return [token if last[token] == number else "" for number, token in enumerate(tokens)]


def lower_case(vocab_file: str | Path) -> bool:
    """Whether the tokenizer of a vocabulary lower-cases text; True where nothing says it.

    What counts is do_lower_case of the tokenizer_config.json beside it, then the normalizer of the
    tokenizer.json, as in transformers.
    """
    path = Path(vocab_file).with_name(TOKENIZER_CONFIG)
    if path.is_file():
        said = read_json(path).get("do_lower_case")
        if said is not None:
            return checked_bool(said, "do_lower_case", path)
    path = Path(vocab_file).with_name(TOKENIZER_JSON)
    normalizer = read_json(path).get("normalizer") if path.is_file() else None
    if isinstance(normalizer, dict) and normalizer.get("lowercase") is not None:
        return checked_bool(normalizer["lowercase"], "normalizer.lowercase", path)
    return True


def checked_bool(value: Any, key: str, path: Path) -> bool:
    """`value` of `key` in the JSON file `path`; UserError unless it is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{path}: {key} is {value!r:.60}; it must be true or false")
    return value
