"""`clue-ds submit`: write and check the zip that CLUE's leaderboard accepts.

    tnews11_predict.json         {"id": 0, "label": "102", "label_desc": ""}
    afqmc_predict.json           {"id": 0, "label": "1"}

Guarantees: no zip is written unless every file in it has a valid label for every line of its test
set, in order; all mistakes are listed at once. The zip's comment records the version and SHA-256 of
each test set.

CLUE scores line by line and reads only the labels. The id is the line's number from 0, as in CLUE's
samples, even if the test file has its own ids (CSL, CLUEWSC2020); predictions may have either. If a
task has two test sets, the file's name contains the version (CLUE's rule since 2021-09).
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds.errors import UserError, existing_file
from clue_ds.tasks import examples, registry
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.predict.command import output_file
from clue_ds.tasks.predict.predictor import Predictor
from clue_ds.tasks.registry import Record, Task

SHOWN = 10  # ids in one message; more are only counted
DATE = (1980, 1, 1, 0, 0, 0)  # a fixed date in the zip, so that equal answers give equal bytes


class TestSet(NamedTuple):
    """A test file and its version."""

    task: Task
    version: str
    examples: Examples

    @property
    def name(self) -> str:
        """The name of its answers in the zip."""
        return file_name(self.task, self.version)


def submit(
    data: Path,
    output: Path = Path("submission.zip"),
    predictions: Path | None = None,
    models: tuple[Path, ...] = (),
    check: Path | None = None,
    force: bool = False,
) -> None:
    """Write the zip for CLUE's leaderboard, or check one; a zip with mistakes is refused.

    Args:
        data: the directory of CLUE's files ({task}_public/test.json; TNEWS also test1.0.json).
        output: the zip to write.
        predictions: a directory of answers from `clue-ds predict --out`, named as in the zip:
            afqmc_predict.json, tnews10_predict.json, tnews11_predict.json.
        models: instead of --predictions, fine-tuned models; each answers every version of its
            task's test set in the data directory.
        check: instead of writing, check this zip against the data.
        force: replace the output if it exists.
    """
    if sum((predictions is not None, bool(models), check is not None)) != 1:
        raise UserError("give exactly one of --predictions, --models and --check")
    if check is not None:
        print(_report(check, check_zip(check, data)))
        return
    if predictions is not None:
        found = read_predictions(predictions, data)
    else:
        found = [pair for model in models for pair in answer(model, data)]
    names = [test.name for test, _ in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two models answer {', '.join(twice)}; give one for each task")
    with output_file(output, force) as stream, zipfile.ZipFile(stream, "w") as archive:
        for test, labels in found:
            info = zipfile.ZipInfo(test.name, DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, "".join(_lines(test.task, labels)))
        archive.comment = json.dumps(_record([test for test, _ in found])).encode()
    print(_report(output, check_zip(output, data)))


def file_name(task: Task, version: str) -> str:
    """{task}_predict.json, with the version in it if the task has several test sets."""
    number = version.replace(".", "") if len(task.test_stems) > 1 else ""
    return f"{task.name}{number}_predict.json"


def _by_name() -> dict[str, tuple[Task, str]]:
    """File name in the zip -> task and version."""
    return {
        file_name(task, version): (task, version)
        for task in registry.TASKS.values()
        for version in task.test_stems
    }


def open_test(task: Task, data: Path, version: str) -> TestSet:
    """A version of a test set; UserError when it is missing, or is another version by content."""
    path = examples.find(task, data, "test", version)
    found = examples.version_of(task, path)
    if found != version:
        raise UserError(
            f"{path} is test set {found} of {task.name} by its content, not {version}; "
            f"rename it to {task.test_stems[found]}{path.suffix}"
        )
    return TestSet(task, version, examples.read(task, path, labelled=False))


def answer(model: Path, data: Path) -> Iterator[tuple[TestSet, list[str]]]:
    """A model's labels for every version of its task's test set in the data directory."""
    predictor = Predictor(model)
    task = predictor.task
    if task is None:
        raise UserError(f"{model} is not fine-tuned for a task of CLUE; give a model that is")
    versions = [v for v in task.test_stems if examples.candidates(task, data, "test", v)]
    for version in versions or list(task.test_stems)[:1]:
        test = open_test(task, data, version)
        encoded = predictor.encode([example.text for example in test.examples])
        yield test, [prediction.label for prediction in predictor.classify(encoded)]


def read_predictions(directory: Path, data: Path) -> list[tuple[TestSet, list[str]]]:
    """The answers in a directory; one UserError lists every mistake in all of its files."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give the directory of the predictions")
    files = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
    mistakes, tests = _known_files(list(files), data, str(directory))
    found = []
    for test in tests:
        path = files[test.name]
        labels, wrong = check_lines(test, path.read_bytes(), str(path))
        mistakes += wrong
        found.append((test, labels))
    _refuse(mistakes, str(directory))
    return found


def check_zip(path: Path, data: Path) -> list[TestSet]:
    """The test sets that a zip answers; one UserError lists every mistake."""
    existing_file(path, "submission")
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
            num_files = len(archive.namelist())
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} is not a complete zip: {error}; write or copy it again") from None
    mistakes, tests = _known_files(list(contents), data, str(path))
    if num_files != len(contents):
        mistakes.append(f"{path} contains a file twice")
    for test in tests:
        mistakes += check_lines(test, contents[test.name], f"{path}:{test.name}")[1]
    _refuse(mistakes, str(path))
    return tests


def _known_files(names: Sequence[str], data: Path, where: str) -> tuple[list[str], list[TestSet]]:
    """(mistakes in file names, test sets of the files with correct names)."""
    known = _by_name()
    mistakes = [] if names else [f"{where} contains no predictions"]
    tests = []
    for name in names:
        if name in known:
            task, version = known[name]
            tests.append(open_test(task, data, version))
            continue
        unversioned = registry.TASKS.get(name.removesuffix("_predict.json"))
        hint = f"accepted names: {', '.join(known)}"
        if unversioned is not None:
            options = " or ".join(file_name(unversioned, v) for v in unversioned.test_stems)
            hint = f"{unversioned.name} has two test sets; call it {options}"
        mistakes.append(f"{where}: {name} is not a file name that CLUE accepts; {hint}")
    return mistakes, tests


def check_lines(test: TestSet, content: bytes, where: str) -> tuple[list[str], list[str]]:
    """(labels, mistakes) of a file of answers."""
    mistakes: list[str] = []
    labels: list[str] = []
    ids: list[Any] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        record = _json_object(line)
        if record is None or "id" not in record or "label" not in record:
            mistakes.append(f'{where}:{number}: not {{"id": ..., "label": ...}}')
            continue
        ids.append(record["id"])
        labels.append(record["label"])
        if record["label"] not in test.task.labels:
            mistakes.append(
                f"{where}:{number}: label {record['label']!r} is not one of {test.task.name}'s"
            )
    mistakes += _wrong_ids(ids, [example.id for example in test.examples], where)
    return labels, mistakes


def _json_object(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _wrong_ids(ids: list[Any], own: list[Any], where: str) -> list[str]:
    """Mistakes in the ids, which must be the test file's own ids or its line numbers."""
    numbers = list(range(len(own)))
    if ids in (own, numbers):
        return []
    mistakes = []
    if len(ids) != len(own):
        mistakes.append(f"{where}: {len(ids):,} answers, but the test set has {len(own):,} lines")
    # Compare with whichever of the two the ids resemble more.
    expected = min((own, numbers), key=lambda either: len({*map(str, either)} ^ {*map(str, ids)}))
    given = [str(i) for i in ids]
    missing = sorted({*map(str, expected)} - {*given}, key=lambda i: (len(i), i))
    unknown = sorted({*given} - {*map(str, expected)}, key=lambda i: (len(i), i))
    twice = [i for i, count in Counter(given).items() if count > 1]
    for what, which in (("missing", missing), ("unknown", unknown), ("twice", twice)):
        if which:
            more = f" and {len(which) - SHOWN:,} more" if len(which) > SHOWN else ""
            mistakes.append(f"{where}: ids {what}: {', '.join(which[:SHOWN])}{more}")
    if not mistakes:
        line = next(n for n, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b)
        mistakes.append(
            f"{where}:{line + 1}: id {ids[line]!r} instead of {expected[line]!r}; answers must be "
            "in the order of the test set"
        )
    return mistakes


def _refuse(mistakes: list[str], what: str) -> None:
    if not mistakes:
        return
    shown = mistakes[: 5 * SHOWN]
    more = f"\n  and {len(mistakes) - len(shown):,} more" if len(mistakes) > len(shown) else ""
    noun = "mistake" if len(mistakes) == 1 else "mistakes"
    listed = "\n  ".join(shown)
    raise UserError(f"{what} can't be submitted: {len(mistakes):,} {noun}:\n  {listed}{more}")


def _lines(task: Task, labels: Iterable[str]) -> Iterator[str]:
    # In CLUE's samples only TNEWS has label_desc, and it may be empty.
    extra = {"label_desc": ""} if task.name == "tnews" else {}
    for number, label in enumerate(labels):
        yield json.dumps({"id": number, "label": label, **extra}) + "\n"


def _record(tests: Sequence[TestSet]) -> dict[str, Any]:
    """The versions and hashes of the test sets, for the zip's comment."""
    return {test.name: {"test": test.version, "sha256": test.examples.sha256} for test in tests}


def _report(path: Path, tests: Sequence[TestSet]) -> str:
    lines = [f"{path} is ready to submit:"]
    for test in tests:
        lines.append(
            f"  {test.name}: {len(test.examples):,} answers to {test.task.name}'s test set "
            f"{test.version} ({test.examples.path.name}, SHA-256 {test.examples.sha256[:12]})"
        )
    absent = [name for name in registry.ALL if name not in {test.task.name for test in tests}]
    if absent:
        lines.append(f"  tasks without answers: {', '.join(absent)}")
    return "\n".join(lines)
