"""The names of the files in a submission: the registry's, unless the user gives others.

A file with a wrong name scores 0 on the leaderboard without a message, so a name that is not
accepted is explained, and the source of each accepted one can be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clue_ds.errors import UserError
from clue_ds.tasks import examples, registry
from clue_ds.tasks.task import Task


class Names:
    """The name of the answers to each test set: the registry's, or the user's for `TASK=FILE`."""

    def __init__(self, data: Path, given: Sequence[str] = ()) -> None:
        self.data = data
        self.given: dict[tuple[str, str], str] = {}
        for word in given:
            target, equals, file = word.partition("=")
            task, _, version = target.partition(":")
            if not equals or task not in registry.TASKS or not file or "/" in file:
                raise UserError(
                    f"--name {word!r}: write TASK=FILE, with a task of {', '.join(registry.TASKS)} "
                    "and the name of a file without a directory"
                )
            self.given[task, self._version(registry.TASKS[task], version, word)] = file
        self.known: dict[str, tuple[Task, str]] = {}  # name in the zip -> task and version
        for task_of in registry.TASKS.values():
            for version in task_of.test_versions:
                file = self.of(task_of, version)
                if file in self.known:
                    other = self.known[file][0].name
                    raise UserError(
                        f"--name: {other} and {task_of.name} would both be called {file}; give "
                        "each a name of its own"
                    )
                self.known[file] = task_of, version

    def _version(self, task: Task, version: str, word: str) -> str:
        """The version that a word means: the one it names, or the only one in the data."""
        if version in task.test_versions:
            return version
        found = list(examples.test_files(task, self.data)) or list(task.test_versions)
        if version or len(found) > 1:
            options = " or ".join(f"{task.name}:{v}=FILE" for v in task.test_versions)
            raise UserError(
                f"--name {word!r}: {task.name} has the test sets {', '.join(task.test_versions)}; "
                f"write {options}"
            )
        return found[0]

    def of(self, task: Task, version: str) -> str:
        return self.given.get((task.name, version), task.answers_name(version))

    def source(self, task: Task, version: str) -> str:
        """Where the name comes from, for the user."""
        if (task.name, version) in self.given:
            return "given with --name"
        return f"name from {task.test_versions[version].source}"

    def advice(self, file: str) -> str:
        """What to do about a name that is not accepted."""
        inside = file.rpartition("/")[2]
        if inside != file and inside in self.known:
            return "the files must be in the zip itself, not in a folder"
        for task in registry.TASKS.values():
            if file in (*task.old_answers, *map(task.answers_name, task.test_versions)):
                options = " or ".join(
                    f"{self.of(task, version)} (test set {version})"
                    for version in task.test_versions
                )
                who = task.old_answers.get(file)
                if who is None:
                    return f"--name calls it {options}"
                source = next(iter(task.test_versions.values())).source
                return (
                    f"it is an old name, from {who}. By {source}, the answers to {task.name} are "
                    f"called {options}; a wrong name scores 0 without a message. Rename the file, "
                    f"or keep the name with --name {task.name}={file}"
                )
        return f"accepted names: {', '.join(self.known)}"
