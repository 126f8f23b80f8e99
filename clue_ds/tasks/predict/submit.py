"""`clue-ds submit`: write and check the zip that CLUE's leaderboard accepts.

    tnews11_predict.json         {"id": 0, "label": "102", "label_desc": ""}
    afqmc_predict.json           {"id": 0, "label": "1"}

Guarantees: no zip is written unless every file in it has a valid answer for every example of its
test set, in order; all mistakes are listed at once. The zip's comment records the version and
SHA-256 of each test set.

The form of a file is its kind's (kinds/): an answer on every line, or one JSON object.

A file with a wrong name scores 0 without a message. The names are data of the registry, with their
source; each is printed with the test version whose answers it has.
"""

from __future__ import annotations

import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds.errors import UserError, existing_file
from clue_ds.tasks import examples, kinds, registry
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.kinds.answer_lines import SHOWN
from clue_ds.tasks.predict.command import output_file
from clue_ds.tasks.predict.names import Names
from clue_ds.tasks.task import Task

MAX_BYTES = 64 << 20  # of a file in the zip
# What zipfile raises for a damaged or encrypted zip, or one that is packed in another way.
DAMAGED = (
    zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, OSError, ValueError,
    IndexError, lzma.LZMAError, struct.error, zlib.error,
)  # fmt: skip
DATE = (1980, 1, 1, 0, 0, 0)  # a fixed date in the zip, so that equal answers give equal bytes


class TestSet(NamedTuple):
    """A test file, its version, and the name of its answers in the zip."""

    task: Task
    version: str
    examples: Examples
    name: str


def submit(
    data: Path,
    output: Path = Path("submission.zip"),
    predictions: Path | None = None,
    models: tuple[Path, ...] = (),
    check: Path | None = None,
    name: tuple[str, ...] = (),
    force: bool = False,
) -> None:
    """Write the zip for CLUE's leaderboard, or check one; a zip with mistakes is refused.

    Args:
        data: the directory of CLUE's files ({task}_public/test.json; TNEWS and CLUEWSC2020 also
            test1.0.json).
        output: the zip to write.
        predictions: a directory of answers from `clue-ds predict --output`, named as in the zip:
            afqmc_predict.json, tnews10_predict.json, tnews11_predict.json.
        models: instead of --predictions, fine-tuned models; each answers every version of its
            task's test set in the data directory.
        check: instead of writing, check this zip against the data.
        name: TASK=FILE, other names in the zip than those of CLUE's guide; TASK:VERSION=FILE for a
            task with two test sets.
        force: replace the output if it exists.
    """
    if sum((predictions is not None, bool(models), check is not None)) != 1:
        raise UserError("give exactly one of --predictions, --models and --check")
    names = Names(data, name)
    if check is not None:
        print(_report(check, check_zip(check, names), names))
        return
    if predictions is not None:
        found = read_predictions(predictions, names)
    else:
        found = [pair for model in models for pair in answer(model, names)]
    found = _first_of_shared(found)
    written = [test.name for test, _ in found]
    twice = sorted({one for one in written if written.count(one) > 1})
    if twice:
        raise UserError(f"two models answer {', '.join(twice)}; give one for each task")
    with output_file(output, force) as stream, zipfile.ZipFile(stream, "w") as archive:
        for test, values in found:
            info = zipfile.ZipInfo(test.name, DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, kinds.of(test.task).submission(test.examples, values))
        archive.comment = json.dumps(_record([test for test, _ in found])).encode()
    print(_report(output, check_zip(output, names), names))


def _first_of_shared(
    found: list[tuple[TestSet, list[Any]]],
) -> list[tuple[TestSet, list[Any]]]:
    """The answers; of a test set that models of several tasks answer, those of the first model."""
    kept: list[tuple[TestSet, list[Any]]] = []
    for test, values in found:
        if test.task.answered_by and test.name in [other.name for other, _ in kept]:
            print(f"{test.name} has the answers of the first model that gives any")
            continue
        kept.append((test, values))
    return kept


def open_test(task: Task, version: str, names: Names) -> TestSet:
    """A version of a test set; UserError when it is missing, or is another version by content."""
    path = examples.find(task, names.data, "test", version)
    found = examples.version_of(task, path) or version
    if found != version:
        raise UserError(
            f"{path} is test set {found} of {task.name} by its content, not {version}; its answers "
            f"are called {names.of(task, found)}. If you have both test sets, call this one "
            f"{task.test_versions[found].stem}{path.suffix}"
        )
    rows = examples.read(task, path, labelled=False)
    return TestSet(task, version, rows, names.of(task, version))


def answer(model: Path, names: Names) -> Iterator[tuple[TestSet, list[Any]]]:
    """A model's answers to every version of its task's test set in the data directory."""
    from clue_ds.tasks.predict.predictor import Predictor  # here, because `--help` needs no torch

    predictor = Predictor(model)
    task = predictor.task
    if task is None:
        raise UserError(f"{model} is not fine-tuned for a task of CLUE; give a model that is")
    if not task.test_versions:
        raise UserError(f"CLUE's leaderboard has no task {task.name}; leave out the model {model}")
    versions = list(examples.test_files(task, names.data)) or list(task.test_versions)[:1]
    wanted = [(task, version) for version in versions]
    for other in registry.TASKS.values():
        if task.name in other.answered_by:
            wanted += [(other, version) for version in examples.test_files(other, names.data)]
    for wanted_task, version in wanted:
        test = open_test(wanted_task, version, names)
        answers = predictor.answers(test.examples, str(test.examples.path))
        yield test, [answer.value for answer in answers]


def read_predictions(directory: Path, names: Names) -> list[tuple[TestSet, list[Any]]]:
    """The answers in a directory; one UserError lists every mistake in all of its files."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give the directory of the predictions")
    files = {path.name: path for path in sorted(directory.iterdir()) if path.is_file()}
    mistakes, tests = _known_files(list(files), names, str(directory))
    found = []
    for test in tests:
        path = files[test.name]
        values, wrong = _check(test, path.read_bytes(), str(path), is_scored=False)
        mistakes += wrong
        found.append((test, values))
    _refuse(mistakes, str(directory))
    return found


def check_zip(path: Path, names: Names) -> list[TestSet]:
    """The test sets that a zip answers; one UserError lists every mistake."""
    existing_file(path, "submission")
    contents: dict[str, bytes] = {}
    mistakes = []
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename in contents:
                    mistakes.append(f"{path} contains {entry.filename} twice")
                if entry.file_size > MAX_BYTES:
                    size = f"{entry.filename} has {entry.file_size:,} bytes"
                    raise zipfile.BadZipFile(f"{size}, and answers have at most {MAX_BYTES:,}")
                contents[entry.filename] = archive.read(entry)
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{path} is not a complete zip of answers: {reason}; write or copy it again"
        ) from None
    wrong, tests = _known_files(list(contents), names, str(path))
    mistakes += wrong
    for test in tests:
        mistakes += _check(test, contents[test.name], f"{path}:{test.name}", is_scored=True)[1]
    _refuse(mistakes, str(path))
    return tests


def _known_files(found: Sequence[str], names: Names, where: str) -> tuple[list[str], list[TestSet]]:
    """(mistakes in file names, test sets of the files with correct names)."""
    mistakes = [] if found else [f"{where} contains no predictions"]
    tests = []
    for file in found:
        if file in names.known:
            tests.append(open_test(*names.known[file], names))
        else:
            advice = names.advice(file)
            mistakes.append(f"{where}: {file} is not a file name that CLUE accepts; {advice}")
    return mistakes, tests


def _check(
    test: TestSet, content: bytes, where: str, is_scored: bool
) -> tuple[list[Any], list[str]]:
    """(values, mistakes) of a file of answers, as its kind has them."""
    return kinds.of(test.task).check(content, test.examples, where, is_scored)


def _refuse(mistakes: list[str], what: str) -> None:
    if not mistakes:
        return
    shown = mistakes[: 5 * SHOWN]
    more = f"\n  and {len(mistakes) - len(shown):,} more" if len(mistakes) > len(shown) else ""
    noun = "mistake" if len(mistakes) == 1 else "mistakes"
    listed = "\n  ".join(shown)
    raise UserError(f"{what} can't be submitted: {len(mistakes):,} {noun}:\n  {listed}{more}")


def _record(tests: Sequence[TestSet]) -> dict[str, Any]:
    """The versions and hashes of the test sets, for the zip's comment."""
    return {test.name: {"test": test.version, "sha256": test.examples.sha256} for test in tests}


def _report(path: Path, tests: Sequence[TestSet], names: Names) -> str:
    said = [f"{path} is ready to submit:"]
    for test in tests:
        said.append(
            f"  {test.name}: {len(test.examples):,} answers to {test.task.name}'s test set "
            f"{test.version} ({test.examples.path.name}, SHA-256 {test.examples.sha256[:12]}); "
            f"{names.source(test.task, test.version)}"
        )
        published = test.task.test_versions[test.version].num_lines
        if published is not None and len(test.examples) != published:
            said.append(
                f"    WARNING: CLUE's test set {test.version} has {published:,} lines, so this "
                "file is not the whole of it, and the leaderboard would not accept the answers"
            )
    absent = [name for name in registry.ALL if name not in {test.task.name for test in tests}]
    if absent:
        said.append(f"  tasks without answers: {', '.join(absent)}")
    return "\n".join(said)
