"""Read a task's files (JSON lines, CSV, TSV) into examples, checking every line.

Guarantees: examples keep the file's order and ids; every mistake is one UserError that names file
and line; lines whose annotators disagreed ("-") are left out and counted, never guessed. Only a
line feed ends a line: other separators (U+2028) belong to the text.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from clue_ds import files
from clue_ds.errors import UserError, existing_file
from clue_ds.tasks.features import Text
from clue_ds.tasks.registry import Record, Split, Task

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
ID_FIELDS = ("id", "idx")
# A model reads a hundredth of this. A longer text means that line feeds or quotes are missing.
MAX_CHARACTERS = 50_000


class Example(NamedTuple):
    """One line of a task's file. `id`: the one in the file, else the line's number from 0."""

    id: int | str
    text: Text
    label: str | None  # None in a test file


class Examples(list[Example]):
    """The examples of one file, in its order, with facts about the file.

    `path` and `sha256` identify it. `num_skipped`: lines whose annotators did not agree on a label.
    `names`: the meaning of each label, if the file has it.
    """

    path: Path
    sha256: str
    num_skipped: int = 0
    names: dict[str, str]


def read(task: Task, path: str | Path, labelled: bool = True) -> Examples:
    """The examples of one file; with `labelled`, every line must have one of the task's labels.

    A UserError names file and line for text that is not UTF-8, invalid JSON, a missing or empty
    field, and a label that the task does not have. It names the file when that is missing, empty,
    or in another format.
    """
    path = existing_file(path, f"{task.name} file")
    examples = collect(task, path, records(path), labelled)
    examples.sha256 = files.sha256(path)
    return examples


def collect(
    task: Task, path: Path, numbered_records: Iterable[tuple[int, Record]], labelled: bool
) -> Examples:
    """The examples of (line number, record) pairs; messages give `path` as their file."""
    examples = Examples()
    examples.path, examples.names = path, {}
    for line, record in numbered_records:
        where = f"{path}:{line}"
        label = _label(task, record, where) if labelled else None
        if label in task.skipped_labels:
            examples.num_skipped += 1
            continue
        text = text_of(task, record, where)
        number = len(examples) + examples.num_skipped
        examples.append(Example(id_of(record, number), text, label))
        if label is not None and task.name_field is not None and record.get(task.name_field):
            examples.names[label] = str(record[task.name_field])
    if not examples:
        skipped = f"all {examples.num_skipped:,} lines are without a label"
        raise UserError(
            f"{path} has no examples: {skipped if examples.num_skipped else 'it is empty'}"
        )
    return examples


def find(task: Task, data: str | Path, split: Split, version: str = "1.1") -> Path:
    """The file of a split, in the task's folder of `data` or in `data` itself.

    `version`: which test set, for a task that has several. The UserError for a missing file lists
    the names that were tried.
    """
    data = Path(data)
    if not data.is_dir():
        reason = "is a file" if data.exists() else "does not exist"
        raise UserError(
            f"data directory {data} {reason}; give the directory that holds the tasks' files"
        )
    if split == "test" and version not in task.test_stems:
        known = ", ".join(task.test_stems)
        raise UserError(f"{task.name} has no test set {version}; versions: {known}")
    found = candidates(task, data, split, version)
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} both exist; remove one")
    if not found:
        names = _file_names(task, split, version)
        raise UserError(f"{data} has no {task.folder}/{names[0]}, nor {', '.join(names)}")
    return found[0]


def candidates(task: Task, data: Path, split: Split, version: str) -> list[Path]:
    """The files of a split in the first directory of `data` that has any, best name first."""
    names = _file_names(task, split, version)
    for directory in (data / task.folder, data / task.name, data):
        found = [directory / name for name in names if (directory / name).is_file()]
        if found:
            return found
    return []


def _file_names(task: Task, split: Split, version: str) -> list[str]:
    stems = (task.test_stems[version],) if split == "test" else task.stems[split]
    return [stem + suffix for stem in stems for suffix in SUFFIXES]


def version_of(task: Task, path: str | Path) -> str:
    """Which version of the test set a file is, judged by its content and not by its name.

    TNEWS 1.0 has keywords and 1.1 has none; the other tasks have one version, 1.1.
    """
    if len(task.test_stems) == 1:
        return next(iter(task.test_stems))
    path = existing_file(path, f"{task.name} file")
    return "1.0" if any(record.get("keywords") for _, record in records(path)) else "1.1"


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) of every line that is not blank; holds one line at a time.

    A UserError names file and line: not UTF-8, invalid JSON, or a wrong number of columns.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end with {', '.join(SUFFIXES)}, which tells its format")
    yield from (_table_records if path.suffix in (".csv", ".tsv") else _json_records)(path)


def _lines(path: Path) -> Iterator[str]:
    """The lines with their line feeds, without a byte order mark."""
    with path.open("rb") as stream:
        for line, data in enumerate(stream, start=1):
            try:
                yield data.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{line}: not UTF-8 ({error.reason}); convert it first"
                ) from None


def _json_records(path: Path) -> Iterator[tuple[int, Record]]:
    for line, content in enumerate(_lines(path), start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except ValueError as error:
            raise UserError(f"{path}:{line}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(
                f"{path}:{line}: a line must be a JSON object, not {content.strip()[:40]!r}"
            )
        yield line, record


def _table_records(path: Path) -> Iterator[tuple[int, Record]]:
    """CSV as spreadsheets write it, or TSV, which has no quoting. Line 1 names the columns."""
    csv.field_size_limit(1 << 30)  # the default refuses texts of more than 131,072 characters
    if path.suffix == ".tsv":
        reader = csv.reader(_lines(path), strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(_lines(path), strict=True)
    columns: list[str] | None = None
    begin = 1
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not any(cells):
                continue
            if columns is None:
                columns = cells
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}:{line}: {len(cells)} columns, but the first line names {len(columns)}"
                )
            yield line, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{begin}: not {path.suffix[1:].upper()}: {error}") from None


def _label(task: Task, record: Record, where: str) -> str:
    if task.label_field not in record:
        raise UserError(
            f"{where}: no field {task.label_field!r} (has {', '.join(record)}); "
            "a file without labels is only good for clue-ds predict"
        )
    value = record[task.label_field]
    label = str(value).lower() if isinstance(value, bool) else str(value)
    if label not in task.labels and label not in task.skipped_labels:
        few = ", ".join(task.labels[:20]) + (", ..." if len(task.labels) > 20 else "")
        raise UserError(f"{where}: label {label!r} is not one of {task.name}'s: {few}")
    return label


def id_of(record: Record, number: int) -> int | str:
    """The record's own id, else the number of its line from 0."""
    return next((record[f] for f in ID_FIELDS if isinstance(record.get(f), int | str)), number)


def text_of(task: Task, record: Record, where: str) -> Text:
    """What the model reads of a record. A UserError begins with `where`: fields are missing."""
    for name in task.fields:
        if name not in record:
            raise UserError(f"{where}: no field {name!r} (has {', '.join(record)})")
    try:
        text = task.text(record)
    except (KeyError, TypeError, ValueError) as error:
        fields = " and ".join(task.fields)
        raise UserError(f"{where}: {fields} can't be read for {task.name}: {error!r}") from None
    return checked(text, where)


def checked(text: Text, where: str) -> Text:
    """Return `text`. A UserError begins with `where`: it is empty, far too long, or not text."""
    texts = text if isinstance(text, tuple) else (text,)
    for one in texts:
        if not isinstance(one, str):
            raise UserError(f"{where}: {one!r} is not text")
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
