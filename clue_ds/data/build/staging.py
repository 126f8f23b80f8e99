"""The state of an unfinished corpus: which shards are done, and what the run was asked for.

It lies in OUTPUT/.building: plan.json and one small JSON a finished piece, written after its shards
were synced and renamed; where duplicates are dropped there is a second one, from when that was
done. The directory goes when corpus.json is there. A lock on it keeps a second run from writing to
the same corpus, where the disk has locks; the system drops the lock when a process dies.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from clue_ds import files
from clue_ds.config import flatten
from clue_ds.data.corpus import HELD_OUT, MANIFEST, REPORT, STATE_DIRECTORY, VOCAB_FILE
from clue_ds.errors import UserError

PLAN = "plan.json"
LOCK = "lock"
# The stages of a piece.
CONVERTED, COMPARED = "converted", "compared"


class Staging:
    """The staging area of `output`, locked while entered.

    request: what the run was asked for (build.Build). Raises a UserError when `output` holds a
    finished corpus, an unfinished one of another request, or files that are none of ours, unless
    `overwrite` says to replace the first two.
    """

    def __init__(self, output: Path, request: dict[str, Any], overwrite: bool) -> None:
        self.output = output
        self.directory = output / STATE_DIRECTORY
        self.request = request
        self._overwrite = overwrite
        self._lock: IO[bytes]

    def __enter__(self) -> Staging:
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"output {self.output} is a file; give a directory")
        finished = (self.output / MANIFEST).is_file()
        if finished and not self._overwrite:
            raise UserError(f"another `clue-ds shard` has just finished {self.output}")
        if not finished and not self.directory.is_dir() and _has_files(self.output):
            raise UserError(
                f"output {self.output} is not empty and holds no corpus; choose another directory"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.directory / LOCK, "wb")
        if not files.lock(self._lock, wait=False):
            self._lock.close()
            raise UserError(f"another `clue-ds shard` is writing to {self.output}")
        self._prepare(finished)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _prepare(self, finished: bool) -> None:
        plan_file = self.directory / PLAN
        if finished or (self._overwrite and plan_file.is_file()):
            self._clear()
        if any(self.records()):  # a run that failed before its first shard has nothing to lose
            begun = files.read_json(plan_file)
            differences = compare_requests(begun, self.request)
            if differences:
                raise UserError(
                    f"{self.output} holds an unfinished run that was asked for something else "
                    f"({'; '.join(differences)}); give the same command as then, or begin anew "
                    "with --overwrite"
                )
        files.write_json(plan_file, self.request)

    def _clear(self) -> None:
        """Remove the corpus that was here: corpus.json first, so that it is never half a corpus."""
        (self.output / MANIFEST).unlink(missing_ok=True)
        for name in (HELD_OUT, REPORT):
            shutil.rmtree(self.output / name, ignore_errors=True)
        for path in (self.output / VOCAB_FILE, *self.output.glob("shard-*.bin*")):
            path.unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _record_file(self, index: int, stage: str) -> Path:
        return self.directory / f"{stage}-{index:06d}.json"

    def get(self, index: int, stage: str = CONVERTED) -> dict[str, Any] | None:
        """The record of piece `index` if that stage of it is finished."""
        path = self._record_file(index, stage)
        return files.read_json(path) if path.is_file() else None

    def put(self, index: int, record: dict[str, Any], stage: str = CONVERTED) -> None:
        """Say that a stage of piece `index` is finished."""
        files.write_json(self._record_file(index, stage), record)

    def records(self, stage: str = CONVERTED) -> Iterator[dict[str, Any]]:
        """The records of all pieces, in order; read one by one, as there may be thousands."""
        for path in sorted(self.directory.glob(f"{stage}-*.json")):
            yield files.read_json(path)

    def remove(self) -> None:
        """Remove the staging area: the corpus is complete."""
        # NFS keeps a file that is open, under another name, and with it the directory.
        self._lock.close()
        shutil.rmtree(self.directory)


def _has_files(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def compare_requests(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, such as "clean.html: False then, True now"; more keys in `then` don't count."""
    before = dict(flatten(then))
    return [
        f"{key.removeprefix('options.')}: {before.get(key)} then, {value} now"
        for key, value in flatten(now)
        if before.get(key) != value
    ]
