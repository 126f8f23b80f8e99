"""The directory of a run: one process, one request, nothing damaged that is resumed from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import files_of_at_most
from test_finetune import WORDS
from test_finetune import model as model  # the fixture
from test_finetune_runs import data as data  # the fixture
from test_finetune_runs import saved_steps
from test_pickles import put, with_bomb

import clue_ds.export as export
from clue_ds.checkpoint import manifest
from clue_ds.errors import UserError
from clue_ds.tasks.finetune import directory, run, score, state
from clue_ds.tasks.finetune.directory import LOCK, RESULT, RUN, STATE
from clue_ds.tasks.finetune.state import States

ROW = "name: tone\ntext: [sentence]\nlabels: [好, 坏]\nbatch_size: 16\nlr: 2e-3\nepochs: 1\n"


def spec(data: Path, model: Path, place: Path, force: bool = False) -> run.RunSpec:
    changes = {"epochs": 1, "save_every": 1}
    return run.RunSpec(
        str(data / "tone.yaml"), str(model), str(data), place, changes, limit=32, force=force
    )


@pytest.fixture(scope="module")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finished") / "run"
    run.run(spec(data, model, place), show=False)
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def snapshot(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def refused(of: run.RunSpec, message: str) -> None:
    """The run is refused with this message, and nothing in its directory changes."""
    before = snapshot(of.directory)
    with pytest.raises(UserError, match=message):
        run.run(of, show=False)
    after = snapshot(of.directory)
    after.pop(LOCK, None)
    before.pop(LOCK, None)
    assert after == before


def test_a_result_belongs_to_the_weights_and_not_to_the_path(
    model: Path, data: Path, place: Path, tmp_path: Path
) -> None:
    """Other weights at the same path were answered with the old result."""
    result = json.loads((place / RESULT).read_text(encoding="utf-8"))
    config, weights = export.load(model)
    here = export.save(config, weights, model / "vocab.txt", tmp_path / "model")
    assert run.run(spec(data, here, place), show=False) == result
    # A head that fine-tuning does not use makes no difference.
    name = "cls.predictions.transform.dense.weight"
    here = export.save(
        config, weights | {name: weights[name] + 1}, model / "vocab.txt", here, force=True
    )
    assert run.run(spec(data, here, place), show=False) == result
    name = "bert.embeddings.word_embeddings.weight"
    other = {**weights, name: weights[name] + 0.01}
    other["cls.predictions.decoder.weight"] = other[name]
    export.save(config, other, model / "vocab.txt", here, force=True)
    refused(spec(data, here, place), "differs in the weights of the model; choose another")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:-2], *WORDS[:-3:-1]]) + "\n", "utf-8")
    export.save(config, weights, tmp_path / "vocab.txt", here, force=True)
    refused(spec(data, here, place), "differs in the vocabulary of the model; choose another")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("label: sentiment\n", r"task_content\.label_field"),
        ("skip: ['-']\n", r"task_content\.skipped_labels"),
        ("max_length: 64\n", r"recipe\.max_length"),
    ],
)
def test_all_fields_of_a_task_are_compared(
    line: str, message: str, model: Path, data: Path, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "tone.yaml").write_text(ROW + line, encoding="utf-8")
    for split in ("train", "dev"):
        text = (data / f"{split}.jsonl").read_text(encoding="utf-8")
        text = text.replace('"label"', '"sentiment"') if "sentiment" in line else text
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    refused(spec(tmp_path, model, place), message)


def test_other_versions_are_another_request(model: Path, data: Path, place: Path) -> None:
    values = json.loads((place / RUN).read_text(encoding="utf-8"))
    values["versions"]["torch"] = "1.0"
    (place / RUN).write_text(json.dumps(values), encoding="utf-8")
    refused(spec(data, model, place), r"differs in versions\.torch")


def test_a_test_set_that_arrives_later_changes_nothing(
    model: Path, data: Path, place: Path
) -> None:
    values = json.loads((place / RUN).read_text(encoding="utf-8"))
    values["test_versions"] = {"1.1": "0" * 64}
    (place / RUN).write_text(json.dumps(values), encoding="utf-8")
    assert run.run(spec(data, model, place), show=False)["epochs"]


@pytest.mark.parametrize("force", [False, True])
def test_nobody_enters_a_directory_in_which_a_process_works(
    force: bool, model: Path, data: Path, tmp_path: Path
) -> None:
    """The second command cleared the directory before the first had saved a state."""
    place = tmp_path / "run"
    with directory.locked(place):
        (place / RUN).write_text("{}", encoding="utf-8")
        refused(spec(data, model, place, force), r"is in use: process \d+ on .* works there; wait")
    assert not (place / LOCK).exists()


def test_the_lock_of_a_killed_process_is_free(model: Path, data: Path, place: Path) -> None:
    (place / LOCK).write_text('{"host": "elsewhere", "pid": 1}', encoding="utf-8")
    assert run.run(spec(data, model, place), show=False)["epochs"]
    assert not (place / LOCK).exists()


def half_done(place: Path) -> Path:
    """Make a finished run look like one that was killed after step 3; the file of its state."""
    content = {"network": {"a": torch.arange(1000.0)}, "progress": {"step": 3}}
    States(place / STATE).save(3, content)
    (place / RESULT).unlink()
    return place / STATE / manifest.name(3) / state.FILE


def flip(path: Path) -> None:
    """One bit, in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_damaged_byte_of_a_state_is_found(tmp_path: Path) -> None:
    States(tmp_path).save(3, {"a": torch.arange(100.0), "b": [1, 2]})
    states, skipped = state.choose(tmp_path)
    assert skipped == [] and states.newest is not None
    assert states.load()["b"] == [1, 2] and torch.equal(states.load()["a"], torch.arange(100.0))
    for name in (state.FILE, manifest.FILE):
        path = states.newest / name
        whole = path.read_bytes()
        for position in range(0, len(whole), 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(damaged)
            with pytest.raises((manifest.Damaged, UserError)):
                state.verify(states.newest)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(manifest.Damaged):
                state.verify(states.newest)
        path.write_bytes(whole)
    assert state.verify(states.newest).step == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "no manifest", "old"])
def test_a_run_with_no_intact_state_starts_again(
    damage: str,
    model: Path,
    data: Path,
    finished: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A flipped bit was resumed from, and a truncated state was a traceback."""
    path = half_done(place)
    if damage == "flip":
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "no manifest":
        (path.parent / manifest.FILE).unlink()
    else:
        shutil.rmtree(place / STATE)
        torch.save({"network": {}}, place / directory.OLD_STATE)
    again = run.run(spec(data, model, place), show=False)
    assert again["losses"] == json.loads((finished / RESULT).read_text())["losses"]
    (note,) = capsys.readouterr().err.splitlines()
    assert "can't resume from" in note and "the run starts again" in note
    assert not {STATE, directory.OLD_STATE} & {p.name for p in place.iterdir()}


@pytest.fixture
def interrupted(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> run.RunSpec:
    """A run that trained all of its two steps, and died before it wrote its result."""
    dies = pytest.MonkeyPatch()
    dies.setattr(run, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    of = spec(data, model, tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        run.run(of, show=False)
    dies.undo()
    assert saved_steps(of.directory) == [2, 1]
    return of


def test_a_damaged_state_costs_only_the_steps_since_the_one_before(
    finished: Path, interrupted: run.RunSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(interrupted.directory / STATE / manifest.name(2) / state.FILE)
    again = run.run(interrupted, show=False)
    assert again["losses"] == json.loads((finished / RESULT).read_text())["losses"]
    (note,) = capsys.readouterr().err.splitlines()
    assert "state.pt has other bytes than when it was saved" in note
    assert note.endswith("the run goes on from step-00000001")


def test_a_state_that_others_could_have_changed_is_refused(interrupted: run.RunSpec) -> None:
    path = interrupted.directory / STATE / manifest.name(2) / state.FILE
    assert path.stat().st_mode & 0o022 == 0
    path.chmod(0o666)
    refused(interrupted, "can be changed by every user.*chmod -R go-w")
    path.chmod(0o644)
    if os.getuid() == 0:  # giving a file away needs root
        os.chown(path, 65534, 65534)
        refused(interrupted, "belongs to user 65534, neither to you nor to root")


def test_a_bomb_in_a_state_with_hashes_that_fit_runs_nothing(
    interrupted: run.RunSpec, tmp_path: Path
) -> None:
    place = interrupted.directory / STATE / manifest.name(2)
    put(place, state.FILE, with_bomb({}, tmp_path / "marker", zipped=True), state.verify)
    with pytest.raises(UserError, match=r"state\.pt was not opened.*Nothing in it was run"):
        run.run(interrupted, show=False)
    assert not (tmp_path / "marker").exists()


def test_states_of_a_finished_run_do_not_stay(data: Path, model: Path, place: Path) -> None:
    """A process that died while it deleted them left some for ever."""
    (place / STATE / manifest.name(2)).mkdir(parents=True)
    assert run.run(spec(data, model, place), show=False)["epochs"]
    assert not (place / STATE).exists()


def as_an_earlier_version_wrote(place: Path) -> dict[str, Any]:
    values = json.loads((place / RUN).read_text(encoding="utf-8"))
    for key in ("model_content", "task_content", "device", "kernels", "num_ranks", "versions"):
        del values[key]
    (place / RUN).write_text(json.dumps(values), encoding="utf-8")
    return values


def test_runs_of_earlier_versions(model: Path, data: Path, place: Path, tmp_path: Path) -> None:
    """A finished one is kept with a note, an unfinished one starts again."""
    now = json.loads((place / RUN).read_text(encoding="utf-8"))
    as_an_earlier_version_wrote(place)
    notes, result, _ = directory.prepare(place, now, force=False)
    assert result is not None and "did not record the weights" in notes[0]
    other = Path(shutil.copytree(place, tmp_path / "other"))
    with pytest.raises(UserError, match=r"differs in model \('.*', now 'moved'\)"):
        directory.prepare(other, now | {"model": "moved"}, force=False)
    assert directory.prepare(other, now, force=True) == ([], None, States(other / STATE))
    assert snapshot(other).keys() == {RUN}
    path = half_done(place)
    notes, result, _ = directory.prepare(place, now, force=False)
    assert result is None and "the run starts again" in notes[0] and not path.exists()


@pytest.mark.parametrize("name", [RUN, RESULT])
def test_damaged_files_are_one_message(name: str, model: Path, data: Path, place: Path) -> None:
    for content in (b"", b"{", b"[]", b"\xff"):
        (place / name).write_bytes(content)
        refused(spec(data, model, place), rf"{name}.*To discard this run, give --force")
    (place / RESULT).write_text('{"task": "tone"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"result\.json is damaged: it has no labels"):
        score.collect((place,))
    assert run.run(spec(data, model, place, force=True), show=False)["epochs"]


def test_a_full_disk_is_one_message(
    model: Path, data: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`capsys` keeps what is printed in memory, where the limit of a file does not count."""
    cases = ((100, "new", "free some space"), (20_000, STATE, "free, and a checkpoint needs about"))
    for num_bytes, name, advice in cases:
        with files_of_at_most(num_bytes), pytest.raises(UserError) as caught:
            run.run(spec(data, model, tmp_path / "new"), show=False)
        assert "can't write" in str(caught.value) and name in str(caught.value)
        assert advice in str(caught.value)
    assert not list((tmp_path / "new").rglob("*.tmp"))
    page = tmp_path / "scores.md"
    page.write_text("before", encoding="utf-8")
    message = r"can't write .*scores\.md.*free some"
    with files_of_at_most(100), pytest.raises(UserError, match=message):
        score.score((place,), markdown=page)
    assert page.read_text(encoding="utf-8") == "before"


def test_a_start_without_room_for_its_states_is_refused(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 0, 10_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"state has 9.8 KiB free.* room for 2.2 of them"):
        run.run(spec(data, model, tmp_path / "new"), show=False)


def test_an_output_below_a_file_is_one_message(
    model: Path, data: Path, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="can't write .*file/run.*give another --output"):
        run.run(spec(data, model, tmp_path / "file" / "run"), show=False)
    with pytest.raises(UserError, match="can't write .*file/a.md.*give another path"):
        score.score((place,), markdown=tmp_path / "file" / "a.md")
