"""The directory of a fine-tuning run: one process at a time, one request, verified files.

Guarantees: while a process works in a directory, from before its first byte to after its last, no
other process changes it; a result is given only to the request that it was computed for; a state
that is damaged is never resumed from: the run goes on from the one before, or starts again when
there is none. The lock is the file system's and ends with its process. On a disk without such locks
(Lustre without `-o flock`) every process gets the lock, and the user must start only one.

Earlier versions of clue_ds recorded neither the model's weights nor the versions of the packages. A
finished result of such a version is kept if all that it recorded agrees, with a note; an unfinished
run starts again, because there is no telling what its state was trained from. So does one whose
state is a single file, as it was before fine-tuning saved its states as pretraining does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clue_ds import files
from clue_ds.checkpoint import manifest as manifests
from clue_ds.errors import UserError
from clue_ds.tasks import outputs
from clue_ds.tasks.kinds.measures import MAJORITY

if TYPE_CHECKING:
    from clue_ds.tasks.finetune.state import States

RUN, EPOCHS, STATE, RESULT = "run.json", "epochs.jsonl", "state", "result.json"
OLD_STATE = "state.pt"  # of earlier versions
LOCK = ".lock"
RESULT_KEYS = (
    "task", "labels", "model", "from_scratch", "limit", "recipe", "data", "test_versions",
    "num_trained_on", "best", "epochs", "losses", "label_names", "seconds", "num_ranks", "versions",
)  # fmt: skip


@contextlib.contextmanager
def locked(directory: Path, wait: bool = False) -> Iterator[None]:
    """Make `directory` if necessary and keep other processes out of it during the block.

    UserError when another process is in it; with `wait`, wait until it leaves.
    """
    path = directory / LOCK
    with outputs.explained(directory, "give another --output"):
        directory.mkdir(parents=True, exist_ok=True)
        file = _lock_file(path, wait)
    with file:
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        try:
            yield
        finally:
            # Removed while it is still locked: see `_lock_file`.
            path.unlink(missing_ok=True)


def _lock_file(path: Path, wait: bool) -> Any:
    while True:
        file = path.open("a+", encoding="utf-8")
        if not files.lock(file, wait):
            file.seek(0)
            holder = file.read()
            file.close()
            raise UserError(f"{path.parent} is in use{_holder(holder)}")
        # The process that had the lock may have removed the file: then this one locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _holder(text: str) -> str:
    advice = "; wait until it ends, or give another --output"
    try:
        holder = json.loads(text)
        return f": process {holder['pid']} on {holder['host']} works there{advice}"
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return f" by another process{advice}"


def prepare(
    directory: Path, run_json: dict[str, Any], force: bool
) -> tuple[list[str], dict[str, Any] | None, States]:
    """(notes for the user, the result if the run is finished, the state that it resumes from).

    UserError when the directory holds something else. Afterwards it holds `run_json`, and states
    only if the run can resume from the newest one. The caller holds the lock.
    """
    from clue_ds.tasks.finetune.state import States  # here, because `--help` needs no torch

    notes: list[str] = []
    states = States(directory / STATE)
    found = holds(directory)
    if found and RUN not in found:
        raise UserError(_no_run(directory))
    if found:
        result, states = _earlier(directory, run_json, force, notes)
        if result is not None:
            return notes, result, states
    files.write_json(directory / RUN, run_json)
    return notes, None, states


def _no_run(directory: Path) -> str:
    return f"{directory} exists and is not a fine-tuning run; choose another --output"


def _other_run(directory: Path, different: list[str]) -> str:
    return (
        f"{directory} holds a run that differs in {', '.join(different)}; choose another "
        "--output, or give --force to discard that run"
    )


def holds(directory: Path) -> set[str]:
    """Names of what an earlier command left in `directory`."""
    return {path.name for path in directory.iterdir()} - {LOCK} if directory.is_dir() else set()


def refusal(directory: Path, run_json: dict[str, Any]) -> str | None:
    """Why `prepare` would refuse the directory without `force`; reads it, and changes nothing."""
    from clue_ds.tasks.finetune import request  # here, because `--help` needs no torch

    found = holds(directory)
    if found and RUN not in found:
        return _no_run(directory)
    if RESULT not in found and not _has_state(directory):
        return None
    different = request.differences(files.read_json(directory / RUN, "run"), run_json)
    return _other_run(directory, different) if different else None


def _has_state(directory: Path) -> bool:
    """Whether a run has saved a state there, intact or not."""
    return (directory / OLD_STATE).exists() or bool(manifests.published(directory / STATE))


def _earlier(
    directory: Path, run_json: dict[str, Any], force: bool, notes: list[str]
) -> tuple[dict[str, Any] | None, States]:
    """(the result of the earlier run in a directory, or the state that it can be continued from).

    If there is neither, the directory is cleared.
    """
    from clue_ds.tasks.finetune import request
    from clue_ds.tasks.finetune.state import States

    none = States(directory / STATE)
    is_finished, has_state = (directory / RESULT).exists(), _has_state(directory)
    try:
        earlier = files.read_json(directory / RUN, "run")
        result = read_result(directory) if is_finished else None
    except UserError as error:
        if not force:
            raise UserError(f"{error}. To discard this run, give --force") from None
        clear(directory)
        return None, none
    different = request.differences(earlier, run_json)
    if different and (is_finished or has_state) and not force:
        raise UserError(_other_run(directory, different))
    is_known = request.is_complete(earlier)
    if result is not None and not different and (is_known or not force):
        if not is_known:
            notes.append(
                f"{directory} was finished by an earlier version, which did not record the weights "
                "of the model; if they may have changed since, give --force to train it again"
            )
        # A process that died while it deleted them may have left some.
        shutil.rmtree(none.folder, ignore_errors=True)
        return result, none
    states = none
    if has_state and not different:
        states = _resumed(directory, is_known, notes)
    if states.newest is None:
        clear(directory)
    return None, states


def _resumed(directory: Path, is_known: bool, notes: list[str]) -> States:
    """The state that the run of a directory goes on from, with notes on what was skipped."""
    from clue_ds.tasks.finetune import state

    states, skipped = state.States(directory / STATE), list[str]()
    if not is_known:
        skipped = [
            f"{directory}: an earlier version saved it, which did not record the weights of the "
            "model"
        ]
    elif (directory / OLD_STATE).exists():
        skipped = [f"{directory / OLD_STATE}: an earlier version saved it, in another format"]
    else:
        states, skipped = state.choose(states.folder)
    if skipped:
        then = f"goes on from {states.newest.name}" if states.newest else "starts again"
        notes.append(f"can't resume from {'; '.join(skipped)}; the run {then}")
    return states


def clear(directory: Path) -> None:
    """Remove everything except the lock."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def read_result(directory: Path) -> dict[str, Any]:
    """The content of a run's result.json; UserError when it is damaged."""
    path = directory / RESULT
    result = files.read_json(path, "result")
    missing = [key for key in RESULT_KEYS if key not in result]
    if "majority" not in result and "baselines" not in result:
        missing.append("baselines")
    if missing:
        raise UserError(f"{path} is damaged: it has no {missing[0]}; restore it from a copy")
    return result


def shown_scores(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(key in result["best"], title) of each score; the first is the main one."""
    # Earlier versions, which had no other tasks than classification, did not record them.
    found = result.get("columns") or [("accuracy", "accuracy"), ("f1", "macro F1")]
    return [(key, title) for key, title in found]


def baselines(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Scores on dev without a model: what is done instead -> its scores."""
    if "baselines" in result:
        return result["baselines"]
    return {MAJORITY: result["majority"]}
