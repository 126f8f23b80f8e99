"""Which checkpoint a run resumes from, and what happens on a full disk; one message for each."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, pretrain_runs, read_log, run_ranks, tiny_config

from clue_ds.checkpoint import manifest, masters, room
from clue_ds.errors import UserError
from clue_ds.pretrain import saving

Made = tuple[Path, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Made:
    """(run directory with checkpoints at 2, 4 and 6, its corpus, how later runs in it ended)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    corpus = make_corpus(folder, sample_text)
    run = folder / "run"
    first = tiny_config(corpus, run, checkpoint={"every": 2, "keep": 3}).model_dump()
    assert run_ranks(1, pretrain_runs, [first]) == [[None]]

    other = folder / "other"
    other.mkdir()
    other_corpus = make_corpus(other, sample_text, num_documents=80)
    other_vocab = folder / "other-vocab"
    other_vocab.mkdir()
    vocab_corpus = make_corpus(other_vocab, sample_text.replace("湖", "海"))

    damaged, moved = folder / "damaged", folder / "moved"
    shutil.copytree(run, damaged)
    os.truncate(next((damaged / "checkpoints/step-00000006/deepspeed").glob("*optim*")), 100)
    (damaged / "checkpoints/step-00000004/manifest.json").unlink()
    all_damaged = folder / "all-damaged"
    shutil.copytree(damaged, all_damaged)
    shutil.rmtree(all_damaged / "checkpoints/step-00000002/deepspeed")
    shutil.copytree(run, moved)
    for kind in ("edited", "newer", "writable"):
        shutil.copytree(run, folder / kind)
    path = folder / "edited/checkpoints/step-00000006/manifest.json"
    path.write_text(path.read_text().replace('"step": 6,', '"step": 5,'))
    path = folder / "newer/checkpoints/step-00000006/manifest.json"
    path.write_text(path.read_text().replace('"format": 2,', '"format": 3,'))
    (folder / "writable/checkpoints/step-00000006/deepspeed").chmod(0o775)
    (folder / "writable/checkpoints/step-00000004.tmp/deepspeed").mkdir(parents=True)
    (folder / "edited/checkpoints/step-00000008.tmp/deepspeed").mkdir(parents=True)

    def with_corpus(directory: Path) -> dict[str, Any]:
        return {**first, "run_dir": str(moved), "data": first["data"] | {"corpus": str(directory)}}

    later: dict[str, dict[str, Any]] = {
        "damaged": {**first, "run_dir": str(damaged)},
        "all-damaged": {**first, "run_dir": str(all_damaged)},
        "corpus": with_corpus(other_corpus),
        "vocab": with_corpus(vocab_corpus),
        **{
            kind: {**first, "run_dir": str(folder / kind)}
            for kind in ("edited", "newer", "writable", "full")
        },
    }
    (results,) = run_ranks(1, later_runs, list(later.values()))
    return run, corpus, dict(zip(later, results, strict=True)) | {"folder": str(folder)}


def later_runs(configs: list[dict[str, Any]]) -> list[str | None]:
    """The last run finds a disk that takes no file above 100 KiB, after its first save."""
    import resource

    from clue_ds.pretrain import train

    results = pretrain_runs(configs[:-1])
    original = saving.Saver.save

    def limited(saver: saving.Saver, step: int, *arguments: Any) -> None:
        if step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, resource.RLIM_INFINITY))
        original(saver, step, *arguments)

    train.saving.Saver.save = limited
    results += pretrain_runs(configs[-1:])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return results


def test_manifest_lists_every_file_and_what_made_it(made: Made) -> None:
    run, corpus, _ = made
    directory = masters.choose(run).directory
    assert directory.name == "step-00000006"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000006\n"
    saved = manifest.verify(directory)
    on_disk = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert set(saved.files) == on_disk - {"manifest.json"}
    assert {"vocab.txt", "config.yaml", "rng-rank00000.safetensors"} <= on_disk
    assert (saved.step, saved.samples, saved.world_size, saved.zero_stage) == (6, 48, 1, 1)
    corpus_json = json.loads((corpus / "corpus.json").read_text())
    assert saved.corpus_fingerprint == corpus_json["fingerprint"]
    assert saved.versions["torch"].startswith(torch.__version__.partition("+")[0])


def test_only_pickles_of_deepspeed(made: Made) -> None:
    directory = masters.choose(made[0]).directory
    ours = [p.name for p in directory.iterdir() if p.is_file() and not p.name.startswith("zero_to")]
    assert all(name.endswith((".json", ".yaml", ".txt", ".safetensors")) for name in ours)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Any, str]] = {
    "cut": (lambda d: os.truncate(d / "frozen.safetensors", 10), "has 10 bytes instead of"),
    "missing": (lambda d: (d / "vocab.txt").unlink(), "vocab.txt is missing"),
    "one bit": (
        lambda d: flip_a_byte(next((d / "deepspeed").glob("*optim*"))),
        "SHA-256 differs",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (
        lambda d: os.truncate(d / "manifest.json", 200),
        "manifest.json can't be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(
    made: Made, damage: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(made[0], run)
    newest = run / "checkpoints" / "step-00000006"
    harm, reason = DAMAGES[damage]
    harm(newest)
    choice = manifest.newest(run)
    assert choice is not None and choice.directory.name == "step-00000004"
    assert list(choice.skipped) == [newest]
    assert reason in choice.skipped[newest]


def test_run_resumes_from_the_newest_intact_one_and_sets_damaged_ones_aside(made: Made) -> None:
    _, _, results = made
    assert results["damaged"] is None
    folder = Path(results["folder"]) / "damaged" / "checkpoints"
    assert {p.name for p in folder.iterdir()} == {
        "latest",
        "step-00000002",
        "step-00000004",
        "step-00000004.damaged",
        "step-00000006",
        "step-00000006.damaged",
    }
    again, full = read_log(folder.parent), read_log(made[0])
    assert [line["loss"] for line in again] == [line["loss"] for line in full]


def test_a_run_resumes_before_an_edited_step_and_removes_what_a_dead_save_left(made: Made) -> None:
    _, _, results = made
    assert results["edited"] is None
    folder = Path(results["folder"]) / "edited" / "checkpoints"
    names = {p.name for p in folder.iterdir()}
    assert "step-00000006.damaged" in names and "step-00000008.tmp" not in names
    again, full = read_log(folder.parent), read_log(made[0])
    assert [line["loss"] for line in again] == [line["loss"] for line in full]


def test_a_newer_checkpoint_and_one_that_others_may_change_stay_as_they_are(made: Made) -> None:
    _, _, results = made
    assert "was made by a newer clue_ds" in results["newer"]
    assert "deepspeed can be changed by every member of its group" in results["writable"]
    for kind in ("newer", "writable"):
        found = manifest.published(Path(results["folder"]) / kind / "checkpoints")
        assert [p.name for p in found] == [f"step-0000000{n}" for n in (6, 4, 2)]


def test_a_run_with_only_damaged_checkpoints_does_not_start_over_silently(made: Made) -> None:
    message = made[2]["all-damaged"]
    assert "no checkpoint in" in message and "is intact" in message
    for part in ("step-00000006: deepspeed/", "step-00000004: manifest.json is missing"):
        assert part in message


def test_a_changed_corpus_and_another_vocabulary_are_refused(made: Made) -> None:
    assert "has changed since" in made[2]["corpus"]
    assert "was trained with another vocabulary than the corpus" in made[2]["vocab"]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_one_message(made: Made) -> None:
    message = made[2]["full"]
    assert "can't write the checkpoint" in message and "step-00000004.tmp" in message
    assert "earlier checkpoints are untouched" in message
    assert "iB free, and a checkpoint needs about 16." in message
    folder = Path(made[2]["folder"]) / "full"
    assert masters.choose(folder).directory.name == "step-00000002"
    assert not list((folder / "checkpoints").glob("*.tmp"))


def test_room_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    assert room.no_room(tmp_path, 1) is None
    message = room.no_room(tmp_path, 10**18)
    assert message is not None and "iB free, but a checkpoint needs about" in message


def test_a_start_needs_room_for_two_checkpoints_and_counts_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / manifest.name(3)).mkdir()
    size = 100 << 20
    with open(tmp_path / manifest.name(3) / "states.pt", "wb") as file:
        file.truncate(size)
    for free, fits in ((220, True), (219, True), (120, True), (119, False), (99, False)):
        usage = shutil._ntuple_diskusage(10**9, 0, free << 20)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        message = room.no_room_to_start(tmp_path, size)
        assert (message is None) == fits, (free, message)
    assert message is not None
    assert "has 99.0 MiB free, and its checkpoints take 100.0 MiB" in message
    assert "room for 2.2 of them (220.0 MiB)" in message


def test_weights_of_something_else_are_refused(tmp_path: Path, made: Made) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        masters.load_weights(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="has saved no checkpoint yet"):
        masters.load_weights(tmp_path)
    directory = tmp_path / "step-00000006"
    shutil.copytree(made[0] / "checkpoints" / "step-00000006", directory)
    flip_a_byte(directory / "frozen.safetensors")
    with pytest.raises(UserError, match="is damaged: frozen.safetensors has other bytes"):
        masters.load_weights(directory)
