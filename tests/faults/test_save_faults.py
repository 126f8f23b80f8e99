"""A save that dies or fails at any operation leaves the run with an intact checkpoint.

The real `saving.Saver` with an engine that holds a few tensors instead of DeepSpeed's; what
DeepSpeed does on a full disk is in tests/test_checkpoint.py, and how its own `save_checkpoint`
fares under the same faults in test_plain_save.py. Saves are in the background, as they are by
default, and the weights change while they are written.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from injector import KILLED, REFUSED, Fault, run
from ranks import TINY_MODEL, tiny_config

from clue_ds import files, presets
from clue_ds.checkpoint import manifest, retention, room
from clue_ds.checkpoint.snapshot import HostMemory, PendingFile
from clue_ds.errors import UserError
from clue_ds.pretrain import saving
from clue_ds.pretrain.resume import RunIdentity

NUM_CRASHES = 100
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class SmallEngine(SimpleNamespace):
    """What `saving` needs of an engine; its weights are the number of the step."""

    def capture(self, directory: Path, tag: str, copies: bool) -> list[PendingFile]:
        (directory / tag).mkdir()
        files = []
        for name in FILES:
            content: Any = {"weights": self.weights}
            content = HostMemory().copy(content) if copies else content
            files.append(PendingFile(directory / tag / name, content, torch))
        return files


def save(root: Path, step: int, async_save: bool = True) -> None:
    """A start of the run in `root` that saves once, keeping one checkpoint."""
    section = {"every": 1, "keep": 1, "async_save": async_save}
    config = tiny_config("corpus", root / "run", checkpoint=section)
    identity = RunIdentity(
        config=config,
        model=presets.get("roberta_tiny_clue").replace(**_shape()),
        vocab_file=root / "vocab.txt",
        vocab_sha256="0" * 64,
        lower_case=True,
        corpora=((0, "1" * 64),),
    )
    engine = SmallEngine(
        weights=torch.full((2_000,), step),
        num_parameters=2_000,
        stage=1,
        offload=False,
        precision="fp32",
        group_names=[["weights"]],
        frozen={"position": torch.full((100,), step)},
    )
    room.prepare_folder(root / "run" / manifest.FOLDER, saving.checkpoint_bytes(engine))
    with saving.Saver(engine, identity) as saver:
        saver.save(step)
        engine.weights.fill_(-1)  # training goes on


def _shape() -> dict[str, Any]:
    return {key: value for key, value in TINY_MODEL.items() if key != "preset"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "run", tmp_path / "saved")
    return tmp_path


def again(root: Path) -> None:
    """The run directory as before the save."""
    shutil.rmtree(root / "run")
    shutil.copytree(root / "saved", root / "run")


def check_intact(root: Path, what: object) -> int:
    """The step of the newest intact checkpoint, after comparing what it holds."""
    choice = manifest.newest(root / "run")
    assert choice is not None, what
    assert choice.skipped == {}, (what, "nothing half-written is ever published")
    step = choice.manifest.step
    for name in FILES:
        weights = torch.load(choice.directory / "deepspeed" / name)["weights"]
        assert torch.equal(weights, torch.full((2_000,), step)), what
    return step


def check_continues(root: Path, what: object) -> None:
    """The next start saves, and nothing of the dead one stays."""
    save(root, 3)
    assert check_intact(root, what) == 3
    names = {path.name for path in (root / "run" / "checkpoints").iterdir()}
    assert names == {"latest", manifest.name(3)}, what


def test_a_save_that_dies_at_any_operation_leaves_an_intact_checkpoint(root: Path) -> None:
    status, total, text = run(root, lambda: save(root, 2), Fault())
    assert status == 0, text
    assert total >= NUM_CRASHES / 2
    assert check_intact(root, "no fault") == 2
    steps = set()
    for number in range(NUM_CRASHES):
        # Evenly over all operations, each with and without a loss of power.
        at = 1 + number // 2 * (total - 1) // (NUM_CRASHES // 2 - 1)
        fault = Fault(at, power_loss=number % 2 == 1)
        again(root)
        status, _, text = run(root, lambda: save(root, 2), fault)
        assert status == KILLED, (fault, text)
        steps.add(check_intact(root, fault))
        if number % 5 == 0:
            check_continues(root, fault)
    assert steps == {1, 2}


def test_the_same_holds_when_training_waits_for_the_save(root: Path) -> None:
    _, total, _ = run(root, lambda: save(root, 2, async_save=False), Fault())
    for at in range(1, total + 1, 7):
        fault = Fault(at, power_loss=at % 2 == 1)
        again(root)
        status, _, text = run(root, lambda: save(root, 2, async_save=False), fault)
        assert status == KILLED, (fault, text)
        check_intact(root, fault)


def test_a_save_in_which_any_operation_fails_is_one_message_or_only_a_warning(root: Path) -> None:
    _, total, _ = run(root, lambda: save(root, 2), Fault())
    refused = 0
    for number in range(1, total + 1):
        fault = Fault(at=number, error=ERRORS[number % len(ERRORS)])
        again(root)
        status, _, text = run(root, lambda: save(root, 2), fault)
        assert status in (0, REFUSED), (fault, text)
        step = check_intact(root, fault)
        assert step == 2 or status == REFUSED, fault
        if status == REFUSED:
            refused += 1
            assert "can't write" in text and "iB free" in text, (fault, text)
    assert refused > total / 2


def test_a_disk_that_is_full_after_any_number_of_bytes_is_one_message(root: Path) -> None:
    sizes = [p.stat().st_size for p in (root / "run").rglob("*") if p.is_file()]

    def with_limit(limit: int) -> Callable[[], None]:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            save(root, 2)

        return limited

    for limit in sorted({size // part for size in sizes for part in (1, 2, 50)} - {max(sizes)}):
        again(root)
        status, _, text = run(root, with_limit(limit), Fault())
        assert status in (0, REFUSED), (limit, text)
        assert check_intact(root, limit) == (2 if status == 0 else 1)
        if status == REFUSED:
            assert "iB free, and a checkpoint needs about" in text
    leftovers = retention.remove_leftovers(root / "run" / "checkpoints")
    assert leftovers == [] and os.listdir(root / "run" / "checkpoints")


def test_the_same_faults_find_a_save_that_syncs_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would prove nothing."""
    monkeypatch.setattr(files, "sync", lambda path: None)
    _, total, _ = run(root, lambda: save(root, 2), Fault())
    found = 0
    for at in range(total - 10, total + 1):
        again(root)
        run(root, lambda: save(root, 2), Fault(at, power_loss=True))
        try:
            found += manifest.newest(root / "run").skipped != {}
        except UserError:  # no checkpoint is left at all
            found += 1
    assert found > 0
