"""manifest.json: no damage and no edit is accepted; who may have written a checkpoint; retention.

Checkpoints of a few bytes, made by the real `publish`; no ranks, no DeepSpeed.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clue_ds.checkpoint import manifest, permissions, retention
from clue_ds.checkpoint.manifest import Damaged, Manifest
from clue_ds.errors import UserError

BATCH = 8


def described(step: int, held_out_loss: float | None = None) -> Manifest:
    return Manifest(
        format=manifest.FORMAT,
        step=step,
        samples=step * BATCH,
        world_size=2,
        zero_stage=1,
        offload=False,
        precision="fp32",
        config={"run_dir": "运行", "train": {"global_batch_size": BATCH, "eps": 1e-6}},
        model={"hidden_size": 32},
        vocab_sha256="0" * 64,
        corpus_fingerprint="1" * 64,
        group_names=[["a", "b"], ["c"]],
        versions={"clue_ds": "0.9", "torch": "2.13.0"},
        files={},
        stream_version=1,
        num_threads=2,
        held_out_loss=held_out_loss,
    )


def publish(folder: Path, step: int, held_out_loss: float | None = None) -> Path:
    final = folder / manifest.name(step)
    staging = final.with_name(final.name + ".tmp")
    (staging / "deepspeed").mkdir(parents=True)
    (staging / "deepspeed" / "states.pt").write_bytes(b"weights" * step)
    (staging / "vocab.txt").write_text("[PAD]\n")
    manifest.publish(staging, final, described(step, held_out_loss))
    return final


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (30, 60):
        publish(tmp_path / manifest.FOLDER, step)
    return tmp_path


@pytest.fixture
def newest(run: Path) -> Path:
    return run / manifest.FOLDER / manifest.name(60)


def edit(directory: Path, seal: bool = True, **changes: Any) -> None:
    """Change keys (None removes one), with or without a hash that fits."""
    path = directory / manifest.FILE
    values = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        values[key] = value
        if value is None:
            del values[key]
    path.write_text(manifest.seal(values) if seal else json.dumps(values), "utf-8")


def test_no_flipped_byte_of_a_manifest_is_accepted(newest: Path) -> None:
    path = newest / manifest.FILE
    original = path.read_bytes()
    draw = random.Random(0)
    places = draw.sample(range(len(original)), 100)
    # Every single bit where the letters of a number or of a key could stay a valid manifest.
    for place in [*places, original.index(b"1e-06") + 1, original.index(b'"format": 2') + 10]:
        for bit in range(8):
            damaged = bytearray(original)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises((Damaged, UserError)):
                manifest.read(newest)
    path.write_bytes(original)
    assert manifest.verify(newest).step == 60


def test_step_38_in_the_directory_of_step_30_is_damaged(run: Path, newest: Path) -> None:
    text = (newest / manifest.FILE).read_text("utf-8")
    (newest / manifest.FILE).write_text(text.replace('"step": 60', '"step": 68'), "utf-8")
    choice = manifest.newest(run)
    assert choice is not None and choice.manifest.step == 30
    assert "its own SHA-256 differs" in choice.skipped[newest]


def without_hash(**changes: Any) -> dict[str, Any]:
    """What makes a manifest one of format 1."""
    removed = {"sha256": None, "num_threads": None, "held_out_loss": None}
    return {"format": 1, **removed, **changes}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "step": ({"step": 68, "samples": 544}, "says step 68, which is not the directory's name"),
    "samples": ({"samples": 470}, "says 470 samples after step 60"),
    "missing": ({"world_size": None}, "wrong at world_size: "),
    "unknown": ({"wrold_size": 2}, "wrong at wrold_size: "),
    "type": ({"zero_stage": "1"}, "wrong at zero_stage: "),
    "bool": ({"world_size": True}, "wrong at world_size: "),
    "negative": ({"world_size": -1}, "wrong at world_size: "),
    "files": ({"files": {"vocab.txt": {"size": 6}}}, "wrong at files.vocab.txt.sha256: "),
    "config": ({"config": {"train": 3}}, "says 480 samples"),
    "outside": ({"files": {"../x": {"size": 6, "sha256": "0" * 64}}}, "outside the checkpoint"),
    "not listed": (
        {"files": {"vocab.txt": None}},
        "wrong at files.vocab.txt",
    ),
    "format 1, step": (without_hash(step=68, samples=544), "says step 68"),
    "format 1, samples": (without_hash(step=60, samples=544), "says 544 samples"),
    "format 1, missing": (without_hash(config=None), "wrong at config: "),
    "format 0": ({"format": 0}, "wrong at format: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_any_surprise_means_damaged_even_with_a_hash_that_fits(newest: Path, what: str) -> None:
    changes, reason = WRONG[what]
    edit(newest, seal="sha256" not in changes, **changes)
    with pytest.raises(Damaged, match=reason):
        manifest.verify(newest)


def test_a_manifest_of_format_1_still_verifies(newest: Path) -> None:
    edit(newest, seal=False, **without_hash())
    assert manifest.verify(newest).num_threads == 0


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "", '"\\ud800"', "\x00", "{}"])
def test_something_else_than_a_manifest_is_damaged(newest: Path, content: str) -> None:
    (newest / manifest.FILE).write_text(content, "utf-8")
    with pytest.raises(Damaged):
        manifest.verify(newest)


def test_a_newer_format_is_refused_and_not_skipped(run: Path, newest: Path) -> None:
    edit(newest, seal=False, format=manifest.FORMAT + 1, shards=[1], step=None)
    with pytest.raises(UserError, match=r"made by a newer clue_ds \(0.9\).*Install that version"):
        manifest.newest(run)
    assert newest.is_dir()


def test_a_file_that_was_not_saved_is_damage_where_deepspeed_reads(newest: Path) -> None:
    (newest / "notes.txt").write_text("mine")
    manifest.verify(newest)
    (newest / "deepspeed" / "more_optim_states.pt").write_bytes(b"")
    with pytest.raises(Damaged, match="more_optim_states.pt is not in manifest.json"):
        manifest.verify(newest)


# ------------------------------------------------------------------------------- owner and mode


@pytest.fixture
def umask_002() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def test_what_is_saved_is_closed_to_others_whatever_the_umask(
    tmp_path: Path, umask_002: None
) -> None:
    directory = publish(tmp_path / "checkpoints", 3)
    manifest.verify(directory)
    for path in (directory, *directory.rglob("*")):
        assert path.stat().st_mode & 0o022 == 0, path
    assert (tmp_path / "checkpoints").stat().st_mode & 0o020, "people may share a project"
    assert permissions.problem(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("part", [".", "deepspeed", "deepspeed/states.pt", "manifest.json"])
@pytest.mark.parametrize(("bit", "who"), [(0o020, "member of its group"), (0o002, "every user")])
def test_what_others_could_have_changed_is_refused_before_it_is_read(
    run: Path, newest: Path, part: str, bit: int, who: str
) -> None:
    path = newest / part
    path.chmod(path.stat().st_mode | bit)
    (newest / "manifest.json").write_text("damaged, but not read")
    with pytest.raises(UserError, match=f"can be changed by .*{who}.* chmod -R go-w"):
        manifest.newest(run)


@pytest.mark.skipif(os.getuid() != 0, reason="giving a file away needs root")
@pytest.mark.parametrize("part", [".", "deepspeed/states.pt"])
def test_what_another_user_owns_is_refused(run: Path, newest: Path, part: str) -> None:
    os.chown(newest / part, 65534, 65534)
    with pytest.raises(UserError, match="belongs to user 65534, neither to you nor to root"):
        manifest.newest(run)


# ------------------------------------------------------------------------------------ retention

LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: 2.0, 50: 4.0, 60: None}


def kept_steps(folder: Path) -> list[int]:
    return sorted(map(manifest.step_of, manifest.published(folder)))


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (retention.Rule(2), [50, 60]),
        (retention.Rule(1, every=20), [20, 40, 60]),
        (retention.Rule(1, best=True), [40, 60]),
        (retention.Rule(1, every=30, best=True), [30, 40, 60]),
        (retention.Rule(9), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_newest_every_and_best_stay(tmp_path: Path, rule: retention.Rule, steps: list[int]) -> None:
    for step, loss in LOSSES.items():
        publish(tmp_path, step, loss)
    assert retention.delete_old(tmp_path, rule) == []
    assert kept_steps(tmp_path) == steps


def test_a_damaged_manifest_is_never_the_best(tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        publish(tmp_path, step, loss)
    edit(tmp_path / manifest.name(20), seal=False, held_out_loss=0.1)
    assert retention.best(manifest.published(tmp_path)) == {tmp_path / manifest.name(40)}


def test_leftovers_are_removed_and_names_of_others_are_not(tmp_path: Path) -> None:
    for name in ("step-00000005.tmp", "step-00000004.damaged", "step-5.tmp", "mine.tmp"):
        (tmp_path / name / "deepspeed").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000007.tmp").symlink_to(tmp_path / "elsewhere")
    assert retention.remove_leftovers(tmp_path) == ["step-00000005.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "elsewhere",
        "mine.tmp",
        "step-00000004.damaged",
        "step-00000007.tmp",
        "step-5.tmp",
    ]


def test_a_damaged_checkpoint_stays_until_enough_newer_ones_are_saved(tmp_path: Path) -> None:
    for step in (20, 40):
        publish(tmp_path, step)
        retention.set_aside(tmp_path / manifest.name(step))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000001.damaged").symlink_to(tmp_path / "elsewhere")
    left = {}
    for step in (20, 40, 60, 80):
        publish(tmp_path, step)
        assert retention.look_after(tmp_path, retention.Rule(2)) == []
        left[step] = sorted(p.name for p in tmp_path.glob("step-000000?0.damaged"))
    both = ["step-00000020.damaged", "step-00000040.damaged"]
    assert left == {20: both, 40: both, 60: both[1:], 80: []}
    assert kept_steps(tmp_path) == [60, 80]
    assert (tmp_path / "step-00000001.damaged").is_symlink() and (tmp_path / "elsewhere").is_dir()


def test_deleting_goes_on_where_an_earlier_deletion_died(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(tmp_path, step)
    (tmp_path / "step-00000001.tmp" / "deepspeed").mkdir(parents=True)
    assert retention.delete_old(tmp_path, retention.Rule(2)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        manifest.name(2),
        manifest.name(3),
    ]
