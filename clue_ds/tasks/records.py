"""Read the records of a file (JSON lines, CSV, TSV), and check the fields that every kind has.

Only a line feed ends a line: other separators (U+2028) belong to the text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError
from clue_ds.tasks import lines
from clue_ds.tasks.features import Text
from clue_ds.tasks.task import Record

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
ID_FIELDS = ("id", "idx")
# A model reads a hundredth of this. A longer text means that line feeds or quotes are missing.
MAX_CHARACTERS = 50_000


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) of every line that is not blank; holds one line at a time.

    A UserError names file and line: not UTF-8, invalid JSON, or a wrong number of columns.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end with {', '.join(SUFFIXES)}, which tells its format")
    if path.suffix in (".csv", ".tsv"):
        yield from _table_records(path)
    else:
        yield from lines.json_objects(enumerate(lines.read_lines(path), start=1), path)


def _table_records(path: Path) -> Iterator[tuple[int, Record]]:
    """CSV as spreadsheets write it, or TSV, which has no quoting. Line 1 names the columns."""
    csv.field_size_limit(1 << 30)  # the default refuses texts of more than 131,072 characters
    text = lines.read_lines(path)
    if path.suffix == ".tsv":
        reader = csv.reader(text, strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(text, strict=True)
    columns: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = [cell.strip() for cell in cells]
                if len(set(columns)) < len(columns):
                    raise UserError(f"{path}:{line}: two columns have the same name; rename one")
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}:{line}: {len(cells)} columns, but the first line names {len(columns)}"
                )
            yield line, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{begin}: not {path.suffix[1:].upper()}: {error}") from None


def label_text(value: Any, where: str) -> str:
    """A label as text, from the JSON string, whole number or boolean `value`."""
    if value is None:
        raise UserError(
            f"{where}: the label is null; give the line a label, or remove the line from the file"
        )
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | str):
        return str(value).strip()
    raise UserError(
        f"{where}: label {value!r} must be a string or a whole number; write it as it is in the "
        "task's list of labels"
    )


def id_of(record: Record, number: int, where: str) -> int | str:
    """The record's own id, else (also if that is null) the number of its line from 0."""
    for name in ID_FIELDS:
        value = record.get(name)
        if isinstance(value, int | str) and not isinstance(value, bool):
            return value
        if value is not None:
            raise UserError(f"{where}: {name} {value!r} must be a whole number or a string")
    return number


def checked_one(text: Any, where: str) -> str:
    """`checked` of a single text."""
    checked(text, where)
    return str(text)


def checked(text: Text, where: str) -> Text:
    """Return `text`. A UserError begins with `where`: it is empty, far too long, or not text."""
    texts = text if isinstance(text, tuple) else (text,)
    for one in texts:
        if not isinstance(one, str):
            shown = "null" if one is None else repr(one)
            raise UserError(f"{where}: {shown} is not text; give a string")
        if len(one) > MAX_CHARACTERS:
            raise UserError(
                f"{where}: a text of {len(one):,} characters, which is more than "
                f"{MAX_CHARACTERS:,}; the model reads only a few hundred. Check that no line feeds "
                "or quotes are missing, or shorten the text"
            )
        try:
            one.encode()
        except UnicodeEncodeError as error:
            char = ascii(one[error.start])
            raise UserError(f"{where}: {char} is half a character (a lone surrogate)") from None
    if not any(one.strip() for one in texts):
        raise UserError(f"{where}: the text is empty")
    return text
