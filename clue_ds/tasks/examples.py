"""Read a task's files into examples, checking every line, and find the files of a data directory.

Guarantees: examples keep the file's order and ids; every mistake is one UserError that names file
and line; lines whose annotators disagreed ("-") are left out and counted, never guessed; what a
kind corrects is counted too. The kind of the task (kinds/) reads the formats and the records.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from clue_ds import files
from clue_ds.errors import UserError, existing_file
from clue_ds.tasks import kinds
from clue_ds.tasks.kinds import Example as Example
from clue_ds.tasks.task import Record, Split, Task


class Examples(list[Example]):
    """The examples of one file, in its order, with facts about the file.

    `path` and `sha256` identify it. `num_skipped`: lines whose annotators did not agree on a label.
    `names`: the meaning of each label, if the file has it. `notes`: what was corrected, and how
    often.
    """

    path: Path
    sha256: str
    num_skipped: int = 0
    names: dict[str, str]
    notes: Counter[str]


def read(task: Task, path: str | Path, labelled: bool = True) -> Examples:
    """The examples of one file; with `labelled`, every line must have an answer of the task.

    A UserError names file and line for text that is not UTF-8, invalid JSON, a missing or empty
    field, and a label that the task does not have. It names the file when that is missing, empty,
    or in another format. A file that CLUE split in two (C3) is read with its second part.
    """
    path = existing_file(path, f"{task.name} file")
    kind = kinds.of(task)
    parts = [path, *_parts(task, path)]
    located = (pair for part in parts for pair in kind.records(part))
    examples = collect(task, path, located, labelled)
    companions = [one for part in parts for one in kind.companions(part)]
    digests = [files.sha256(one) for one in (*parts, *companions)]
    examples.sha256 = digests[0]
    if len(digests) > 1:
        examples.sha256 = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return examples


def _parts(task: Task, path: Path) -> list[Path]:
    """The files that continue a file."""
    stems = task.continued.get(path.stem, ())
    return [existing_file(path.with_name(s + path.suffix), f"{task.name} file") for s in stems]


def collect(
    task: Task, path: Path, located: Iterable[tuple[str, Record]], labelled: bool
) -> Examples:
    """The examples of (place for messages, record) pairs; `path` is the file that they are of."""
    kind = kinds.of(task)
    examples = Examples()
    examples.path, examples.names, examples.notes = path, {}, Counter()
    for where, record in located:
        number = len(examples) + examples.num_skipped
        example = kind.example(record, number, where, labelled, examples.notes)
        if example is None:
            examples.num_skipped += 1
            continue
        examples.append(example)
        name = record.get(task.name_field) if task.name_field is not None else None
        if example.label is not None and isinstance(name, str) and name:
            examples.names[str(example.label)] = name
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
    names, suffixes = _file_names(task, split, version), kinds.of(task).suffixes
    for directory in (data / task.folder, data / task.name, data):
        found = [directory / name for name in names if (directory / name).is_file()]
        if not found and split == "test":
            old = [stem + suffix for stem in task.old_stems(version) for suffix in suffixes]
            named = [directory / name for name in old if (directory / name).is_file()]
            found = [path for path in named if version_of(task, path) == version]
        if found:
            return found
    return []


def _file_names(task: Task, split: Split, version: str) -> list[str]:
    stems = (task.test_versions[version].stem,) if split == "test" else task.stems[split]
    return [stem + suffix for stem in stems for suffix in kinds.of(task).suffixes]


def version_of(task: Task, path: str | Path) -> str | None:
    """Which version of the test set a file is by its content; None when that doesn't tell."""
    if len(task.test_versions) == 1:
        return next(iter(task.test_versions))
    path = existing_file(path, f"{task.name} file")
    if task.recognize is None:
        return None
    return task.recognize(record for _, record in kinds.of(task).records(path))


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
