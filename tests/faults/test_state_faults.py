"""A save of fine-tuning that dies or fails at any operation leaves a state to resume from.

The same faults as in test_save_faults.py, on the states of tasks/finetune/state.py.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from injector import KILLED, REFUSED, Fault, run
from limits import files_of_at_most

from clue_ds import files
from clue_ds.checkpoint import manifest, retention, room
from clue_ds.tasks.finetune import state
from clue_ds.tasks.finetune.state import States

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


def save(root: Path, step: int) -> None:
    """A start of the run in `root` that saves once."""
    states = States(root / "state")
    room.prepare_folder(states.folder, 1 << 20)
    content = {"network": {"a": torch.full((2_000,), step)}, "progress": {"step": step}}
    states.save(step, content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run that has saved twice; a further save deletes the first of the two."""
    for step in (1, 2):
        save(tmp_path, step)
    shutil.copytree(tmp_path / "state", tmp_path / "saved")
    return tmp_path


def again(root: Path, then: Callable[[], None], fault: Fault) -> tuple[int, int, str]:
    """`then` under `fault`, in the directory as it was before the save."""
    shutil.rmtree(root / "state")
    shutil.copytree(root / "saved", root / "state")
    return run(root, then, fault)


def newest(root: Path, what: object) -> int:
    """The step of the newest state, after comparing what it holds."""
    states, skipped = state.choose(root / "state")
    assert skipped == [] and states.newest is not None, (what, skipped)
    step = manifest.step_of(states.newest)
    content = states.load()
    assert content["progress"] == {"step": step}, what
    assert torch.equal(content["network"]["a"], torch.full((2_000,), step)), what
    return step


def test_a_save_that_dies_at_any_operation_leaves_an_intact_state(root: Path) -> None:
    status, total, text = again(root, lambda: save(root, 3), Fault())
    assert status == 0 and total > 20, text
    assert newest(root, "no fault") == 3
    steps = set()
    for at in range(1, total + 1):
        fault = Fault(at, power_loss=at % 2 == 1)
        status, _, text = again(root, lambda: save(root, 3), fault)
        assert status == KILLED, (fault, text)
        steps.add(newest(root, fault))
        if at % 5 == 0:
            save(root, 4)
            assert newest(root, fault) == 4
            assert not list((root / "state").glob("*.tmp")), fault
    assert steps == {2, 3}


def test_a_save_in_which_any_operation_fails_is_one_message_or_only_a_warning(root: Path) -> None:
    _, total, _ = again(root, lambda: save(root, 3), Fault())
    refused = 0
    for at in range(1, total + 1):
        fault = Fault(at, error=ERRORS[at % len(ERRORS)])
        status, _, text = again(root, lambda: save(root, 3), fault)
        assert status in (0, REFUSED), (fault, text)
        step = newest(root, fault)
        assert step == 3 or status == REFUSED, fault
        if status == REFUSED:
            refused += 1
            assert "can't write" in text and "iB free" in text, (fault, text)
    assert refused > total / 2


def test_a_disk_that_is_full_after_any_number_of_bytes_is_one_message(root: Path) -> None:
    size = (root / "state" / manifest.name(2) / state.FILE).stat().st_size

    def with_limit(limit: int) -> Callable[[], None]:
        def limited() -> None:
            with files_of_at_most(limit):
                save(root, 3)

        return limited

    for limit in (0, 50, 500, size // 2, size - 1, size + (1 << 20)):
        status, _, text = again(root, with_limit(limit), Fault())
        assert status == (0 if limit > size else REFUSED), (limit, text)
        assert newest(root, limit) == (3 if limit > size else 2)
        assert limit > size or "iB free, and a checkpoint needs about" in text
    assert retention.remove_leftovers(root / "state") == []


def test_the_same_faults_find_a_save_that_syncs_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would prove nothing."""
    monkeypatch.setattr(files, "sync", lambda path: None)
    _, total, _ = again(root, lambda: save(root, 3), Fault())
    found = 0
    for at in range(total - 10, total + 1):
        again(root, lambda: save(root, 3), Fault(at, power_loss=True))
        found += state.choose(root / "state")[1] != []
    assert found > 0
