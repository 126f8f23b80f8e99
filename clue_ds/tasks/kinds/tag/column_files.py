"""Read sentences in columns (CoNLL): a character or word and its tag on a line.

    浙    B-company
    商    I-company
    ，    O

A blank line ends a sentence. Tags are O and a prefix with a type: B-, I- (or M-), E- (or L-), and
S- (or U-). Columns are separated by tabs, or else by spaces; the first is the character or word and
the last is the tag. A sentence becomes the record that a line of CLUENER's JSON would be, so that
everything after is the same.

Guarantees: only tabs and ASCII spaces separate columns, so U+3000 can be a character; every mistake
is one UserError with file and line. An entity may begin with I-, as in the tags of CoNLL-2003
(IOB1). A space is put between two words if both are Latin and one has several letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds.errors import UserError
from clue_ds.tasks import lines
from clue_ds.tasks.kinds.tag import entities
from clue_ds.tasks.kinds.tag.entities import Entity

SUFFIXES = (".conll", ".bio", ".bioes", ".bmes")
BLANK = " \t\r\n"
DOCUMENT = "-DOCSTART-"
OUTSIDE = "O"
BEGINS, CONTINUES, ENDS, SINGLE = "B", "IM", "EL", "SU"
FORM = "O, B-TYPE, I-TYPE, and in BIOES or BMES also E-TYPE, S-TYPE, M-TYPE"


class Row(NamedTuple):
    """One line: its number, the character or word, and its tag."""

    number: int
    word: str
    tag: str | None


def records(
    path: Path, types: Sequence[str], text_field: str, label_field: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its first line, record) of every sentence, one at a time.

    A sentence whose lines all have one column is a record without a label.
    """
    for sentence in _sentences(path):
        text, places = _join([row.word for row in sentence])
        record: dict[str, Any] = {text_field: text}
        if any(row.tag is not None for row in sentence):
            found = _entities(sentence, places, types, path)
            record[label_field] = entities.label_of(found, text)
        yield sentence[0].number, record


def _sentences(path: Path) -> Iterator[list[Row]]:
    sentence: list[Row] = []
    for number, line in enumerate(lines.read_lines(path), start=1):
        if line.strip(BLANK) and not line.startswith(DOCUMENT):
            sentence.append(_row(line.rstrip(BLANK), number))
        elif sentence:
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _row(line: str, number: int) -> Row:
    word, *others = line.split("\t" if "\t" in line else " ")
    others = [cell for cell in others if cell]
    # Nothing before the separator: the character is a space.
    return Row(number, word or " ", others[-1] if others else None)


def _join(words: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """(the text, where each word is in it)."""
    text = ""
    places = []
    before = ""
    for word in words:
        is_latin = text[-1:].isascii() and text[-1:].isalnum()
        is_latin = is_latin and word[:1].isascii() and word[:1].isalnum()
        if is_latin and max(len(before), len(word)) > 1:
            text += " "
        places.append((len(text), len(text) + len(word)))
        text += word
        before = word
    return text, places


def _entities(
    sentence: list[Row], places: list[tuple[int, int]], types: Sequence[str], path: Path
) -> list[Entity]:
    found: list[Entity] = []
    is_open = False  # whether the last entity found may go on
    for row, (start, end) in zip(sentence, places, strict=True):
        prefix, kind = _tag(row, types, path)
        if prefix == OUTSIDE:
            is_open = False
            continue
        if is_open and prefix in CONTINUES + ENDS and found[-1].type == kind:
            found[-1] = found[-1]._replace(end=end)
        else:
            found.append(Entity(kind, start, end))
        is_open = prefix in BEGINS + CONTINUES
    return found


def _tag(row: Row, types: Sequence[str], path: Path) -> tuple[str, str]:
    tag, where = row.tag, f"{path}:{row.number}"
    if tag is None:
        raise UserError(
            f"{where}: {row.word[:40]!r} has no tag, but other lines of the sentence have; write "
            "the character or word, a tab, and its tag"
        )
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, _, kind = tag.partition("-")
    if not kind or prefix not in (*BEGINS, *CONTINUES, *ENDS, *SINGLE):
        raise UserError(
            f"{where}: the last column of {row.word!r} is {tag!r}, which is no tag; tags are {FORM}"
        )
    entities.check_type(kind, types, where)
    return prefix, kind
