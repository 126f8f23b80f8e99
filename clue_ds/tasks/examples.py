"""Read a task's files (JSON lines, CSV, TSV) into examples, checking every line.

Guarantees: examples keep the file's order and ids; every mistake is one UserError that names file
and line; lines whose annotators disagreed ("-") are left out and counted, never guessed. Only a
line feed ends a line: other separators (U+2028) belong to the text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds import files
from clue_ds.errors import UserError, existing_file
from clue_ds.tasks import lines
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
        examples.append(Example(id_of(record, number, where), text, label))
        name = record.get(task.name_field) if task.name_field is not None else None
        if label is not None and isinstance(name, str) and name:
            examples.names[label] = name
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
    if split == "test" and version not in task.test_versions:
        known = ", ".join(task.test_versions)
        raise UserError(f"{task.name} has no test set {version}; versions: {known}")
    found = candidates(task, data, split, version)
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} both exist; remove one")
    if not found:
        names = _file_names(task, split, version)
        raise UserError(f"{data} has no {task.folder}/{names[0]}, nor {', '.join(names)}")
    return found[0]


def candidates(task: Task, data: Path, split: Split, version: str) -> list[Path]:
    """The files of a split in the first directory of `data` that has any, best name first.

    Older archives call the test set 1.0 `test`, which is the name of 1.1 today: a file of that name
    is a candidate for 1.0 if its content is 1.0's.
    """
    names = _file_names(task, split, version)
    for directory in (data / task.folder, data / task.name, data):
        found = [directory / name for name in names if (directory / name).is_file()]
        if not found and split == "test":
            old = [stem + suffix for stem in task.old_stems(version) for suffix in SUFFIXES]
            named = [directory / name for name in old if (directory / name).is_file()]
            found = [path for path in named if version_of(task, path) == version]
        if found:
            return found
    return []


def _file_names(task: Task, split: Split, version: str) -> list[str]:
    stems = (task.test_versions[version].stem,) if split == "test" else task.stems[split]
    return [stem + suffix for stem in stems for suffix in SUFFIXES]


def version_of(task: Task, path: str | Path) -> str | None:
    """Which version of the test set a file is by its content; None when that doesn't tell."""
    if len(task.test_versions) == 1:
        return next(iter(task.test_versions))
    path = existing_file(path, f"{task.name} file")
    return task.recognize(record for _, record in records(path)) if task.recognize else None


def test_files(task: Task, data: Path) -> dict[str, Path]:
    """The file of each version of the test set that the data directory has.

    A file that is another version by its content counts as that version, unless that version has
    a file of its own: then one of the two has the wrong name, and `submit` refuses it.
    """
    found: dict[str, Path] = {}
    for version in task.test_versions:
        if candidates(task, data, "test", version):
            path = find(task, data, "test", version)
            content = version_of(task, path) or version
            if content == version or candidates(task, data, "test", content) != [path]:
                found[version] = path
    return found


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


def _label(task: Task, record: Record, where: str) -> str:
    if task.label_field not in record:
        raise UserError(
            f"{where}: no field {task.label_field!r} (has {', '.join(record)}); "
            "a file without labels is only good for clue-ds predict"
        )
    label = label_text(record[task.label_field], where)
    if label not in task.labels and label not in task.skipped_labels:
        few = ", ".join(task.labels[:20]) + (", ..." if len(task.labels) > 20 else "")
        raise UserError(f"{where}: label {label!r} is not one of {task.name}'s: {few}")
    return label


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
