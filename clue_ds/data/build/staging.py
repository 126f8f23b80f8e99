"""The state of an unfinished corpus: which shards are finished, and what the run was asked for.

OUTPUT/.building holds plan.json and one small JSON record per finished chunk, written after the
shards of the chunk were synced and renamed. Where duplicates are dropped, a second record is
written when that is done. The directory is removed once corpus.json is written. On a file system
with locks, a lock keeps a second run from writing to the same corpus; the system drops it when a
process ends.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from clue_ds import files
from clue_ds.config import flatten
from clue_ds.data.corpus import CHECKSUMS, HELD_OUT, MANIFEST, REPORT, STATE_DIRECTORY, VOCAB_FILE
from clue_ds.errors import UserError

PLAN = "plan.json"
LOCK = "lock"
# The stages of a chunk: its shards are written; its duplicates are dropped.
CONVERTED, COMPARED = "converted", "compared"


class Staging:
    """The staging area of `output`, locked inside its `with` block.

    request: what the run was asked for (`Build.request`). Raises a UserError when `output` holds a
    finished corpus or an unfinished one of another request, unless `overwrite` replaces it, and
    always when it holds other files.
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
            raise UserError(
                f"another `clue-ds shard` has just finished {self.output}; use it, or replace it "
                "with --force"
            )
        if not finished and not self.directory.is_dir() and _has_files(self.output):
            raise UserError(
                f"output {self.output} is not empty and holds no corpus; choose another directory"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.directory / LOCK, "wb")
        if not files.lock(self._lock, wait=False):
            self._lock.close()
            raise UserError(
                f"another `clue-ds shard` is writing to {self.output}; wait for it, or choose "
                "another --output"
            )
        self._prepare(finished)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _prepare(self, finished: bool) -> None:
        plan_file = self.directory / PLAN
        if finished or (self._overwrite and plan_file.is_file()):
            self._clear()
        if any(self.records()):  # else the run failed before its first shard: nothing would be lost
            begun = files.read_json(plan_file)
            differences = compare_requests(begun, self.request)
            if differences:
                raise UserError(
                    f"{self.output} holds an unfinished run of other inputs or options "
                    f"({'; '.join(differences)}); repeat that command to finish it, or start over "
                    "with --force"
                )
        files.write_json(plan_file, self.request)

    def _clear(self) -> None:
        """Remove the old corpus: corpus.json first, so that half a corpus never looks finished."""
        (self.output / MANIFEST).unlink(missing_ok=True)
        for name in (HELD_OUT, REPORT):
            shutil.rmtree(self.output / name, ignore_errors=True)
        for path in self.output.glob("shard-*.bin*"):
            path.unlink()
        for name in (VOCAB_FILE, CHECKSUMS):
            (self.output / name).unlink(missing_ok=True)
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def _record_file(self, index: int, stage: str) -> Path:
        return self.directory / f"{stage}-{index:06d}.json"

    def get(self, index: int, stage: str = CONVERTED) -> dict[str, Any] | None:
        """The record of chunk `index` if this stage of it is finished, else None."""
        path = self._record_file(index, stage)
        return files.read_json(path) if path.is_file() else None

    def put(self, index: int, record: dict[str, Any], stage: str = CONVERTED) -> None:
        """Record that a stage of chunk `index` is finished."""
        files.write_json(self._record_file(index, stage), record)

    def records(self, stage: str = CONVERTED) -> Iterator[dict[str, Any]]:
        """The records of all chunks in order, read one by one because there may be thousands."""
        for path in sorted(self.directory.glob(f"{stage}-*.json")):
            yield files.read_json(path)

    def remove(self) -> None:
        """Remove the staging area; called when the corpus is complete."""
        # NFS keeps a file that is still open under another name, and so the directory wouldn't go.
        self._lock.close()
        shutil.rmtree(self.directory)


def _has_files(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def compare_requests(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences, such as "clean.html: False then, True now"; only keys of `now` count."""
    before = dict(flatten(then))
    return [
        f"{key.removeprefix('options.')}: {before.get(key)} then, {value} now"
        for key, value in flatten(now)
        if before.get(key) != value
    ]
