"""Fine-tuning runs: resumed bit for bit, best epoch kept, ranks agree, runs are not mixed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_finetune import CONFIG, examples
from test_finetune import model as model  # the fixture

import clue_ds.export as export
from clue_ds.checkpoint import manifest
from clue_ds.errors import UserError
from clue_ds.model import BertForPreTraining
from clue_ds.tasks import kinds, registry
from clue_ds.tasks.finetune import command, progress, run
from clue_ds.tasks.finetune.loop import Recipe, _is_over
from clue_ds.tasks.finetune.run import RunSpec
from clue_ds.tasks.kinds import measures

ROW = "name: tone\ntext: [sentence]\nlabels: [好, 坏]\nbatch_size: 16\nlr: 2e-3\nepochs: 3\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    (directory / "tone.yaml").write_text(ROW, encoding="utf-8")
    for split, count, seed in (("train", 203, 1), ("dev", 45, 2)):
        rows = [{"sentence": text, "label": label} for text, label in examples(count, seed)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


def run_spec(model: Path, data: Path, directory: Path, **changes: Any) -> RunSpec:
    return RunSpec(str(data / "tone.yaml"), str(model), str(data), directory, changes)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return export.load(directory / "model")[1]


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first | second)


def saved_steps(directory: Path) -> list[int]:
    """The steps of the states that a run can resume from, the newest first."""
    return list(map(manifest.step_of, manifest.published(directory / run.STATE)))


def test_killed_run_continues_bit_for_bit(model: Path, data: Path, tmp_path: Path) -> None:
    changes = {"save_every": 4, "epochs": 6}
    whole = run.run(run_spec(model, data, tmp_path / "whole", **changes), show=False)
    code = (
        "import sys, json; from pathlib import Path; from clue_ds.tasks.finetune import run;"
        "task, model, data, out, changes = sys.argv[1:];"
        "run.run(run.RunSpec(task, model, data, Path(out), json.loads(changes)))"
    )
    spec = run_spec(model, data, tmp_path / "cut", **changes)
    arguments = [spec.task, spec.model, spec.data, str(spec.directory), json.dumps(changes)]
    # The order of a sum, and so its last bit, depends on the number of threads.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **threads},
    )
    while not saved_steps(spec.directory) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (spec.directory / run.RESULT).exists()
    assert 0 < saved_steps(spec.directory)[0] < len(whole["losses"])
    resumed = run.run(spec, show=False)
    assert resumed["losses"] == whole["losses"] and resumed["epochs"] == whole["epochs"]
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert not (spec.directory / run.STATE).exists()


def test_finished_run_is_read_and_another_run_is_refused(
    model: Path, data: Path, tmp_path: Path
) -> None:
    spec = run_spec(model, data, tmp_path / "run", epochs=1)
    first = run.run(spec, show=False)
    written = (tmp_path / "run" / run.RESULT).stat().st_mtime_ns
    assert run.run(spec, show=False) == json.loads(json.dumps(first))
    assert (tmp_path / "run" / run.RESULT).stat().st_mtime_ns == written
    other = run_spec(model, data, tmp_path / "run", epochs=2)
    with pytest.raises(UserError, match=r"differs in recipe\.epochs"):
        run.run(other, show=False)


def test_best_epoch_is_kept_and_patience_ends_the_run(
    model: Path, data: Path, tmp_path: Path
) -> None:
    spec = run_spec(model, data, tmp_path / "run", epochs=30, patience=2)
    result = run.run(spec, show=False)
    accuracies = [line["accuracy"] for line in result["epochs"]]
    assert len(accuracies) < 30
    assert result["best"]["accuracy"] == max(accuracies)
    assert result["best"]["epoch"] == accuracies.index(max(accuracies)) + 1
    assert len(accuracies) - result["best"]["epoch"] == 2
    counts = result["confusion"]
    assert sum(map(sum, counts)) == 45
    assert (counts[0][0] + counts[1][1]) / 45 == result["best"]["accuracy"]


def test_dropout_of_fine_tuning_replaces_that_of_the_model(
    model: Path, data: Path, tmp_path: Path
) -> None:
    found = {}
    for dropout in (None, 0.0, 0.5):
        spec = run_spec(model, data, tmp_path / str(dropout), epochs=1, dropout=dropout)
        found[dropout] = run.run(spec, show=False)["losses"]
        written = json.loads((spec.directory / "model" / "config.json").read_text("utf-8"))
        of_model = json.loads((model / "config.json").read_text("utf-8"))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            assert written[name] == (of_model[name] if dropout is None else dropout)
    # The same head and the same order of the examples; only what is dropped differs.
    assert len({losses[0] for losses in found.values()}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"max_length": 2}, "max_length 2 must be at least 3"),
        ({"lr": -1.0}, "lr -1.0 must be at least 0"),
        ({"lr": float("nan")}, "lr nan must be at least 0"),
        ({"warmup_ratio": 2.0}, "warmup_ratio 2.0 must be at least 0 and less than 1"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and less than 1"),
        ({"grid": ("dropout=0.1,1.5",)}, "dropout 1.5 must be at least 0 and less than 1"),
        ({"seeds": 0}, "seeds 0 must be at least 1"),
        ({"workers": 0}, "workers 0 must be at least 1"),
        ({"limit": 0}, "limit 0 must be at least 1"),
    ],
)
def test_numbers_that_can_not_be_meant(
    options: dict[str, Any], message: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        command.finetune(("afqmc",), str(model), str(data), tmp_path / "runs", **options)
    assert not (tmp_path / "runs").exists()


def test_patience_counts_from_the_first_best_epoch() -> None:
    lines = [{"epoch": n + 1, "accuracy": a} for n, a in enumerate([0.5, 0.7, 0.7, 0.6])]
    kind = kinds.of(registry.TASKS["afqmc"])
    assert _is_over(lines, Recipe(patience=2), kind)
    assert not _is_over(lines[:3], Recipe(patience=2), kind)
    assert not _is_over(lines, Recipe(patience=0), kind)


def test_measures_against_numbers_worked_out_by_hand() -> None:
    truth, said = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 0]
    counts = measures.confusion(truth, said, 4)
    assert counts[:3, :3].tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    # F1 = 2 right / (said + true): 4/7, 2/4, 0; the class that never occurs doesn't count.
    assert measures.scores(truth, said, 4) == {
        "accuracy": 0.5,
        "f1": pytest.approx((4 / 7 + 1 / 2) / 3),
    }
    assert measures.majority([1, 1, 0], truth, 4)["accuracy"] == pytest.approx(2 / 6)


def _finetune_on_ranks(model: str, data: str, directory: str) -> list[float]:
    from clue_ds.pretrain import engine

    engine.start()
    spec = run_spec(Path(model), Path(data), Path(directory), epochs=2)
    return run.run(spec, show=False)["losses"]


def test_two_ranks_train_what_one_trains(data: Path, model: Path, tmp_path: Path) -> None:
    """203 examples in batches of 16 leave 11 for the last one: 6 on one rank, 5 on the other."""
    still = CONFIG.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    state = BertForPreTraining(still).state_dict()
    plain = export.save(still, state, model / "vocab.txt", tmp_path / "plain")
    alone = run.run(run_spec(plain, data, tmp_path / "alone", epochs=2), show=False)
    both = run_ranks(2, _finetune_on_ranks, str(plain), str(data), str(tmp_path / "both"))
    assert both[0] == both[1]
    # fp32 sums in another order, through 26 AdamW steps.
    assert both[0] == pytest.approx(alone["losses"], rel=1e-3)
    result = json.loads((tmp_path / "both" / run.RESULT).read_text())
    assert result["num_ranks"] == 2
    assert result["best"]["accuracy"] == pytest.approx(alone["best"]["accuracy"], abs=0.03)


def test_grid_continues_shares_and_keeps_the_best(model: Path, data: Path, tmp_path: Path) -> None:
    def call(array_task: str | None = None, workers: int = 1) -> None:
        command.finetune(
            (str(data / "tone.yaml"),),
            str(model),
            str(data),
            tmp_path,
            epochs=4,
            grid=("lr=2e-3,1e-6",),
            seeds=2,
            array_task=array_task,
            workers=workers,
        )

    call("1/2")
    folder = tmp_path / "tone"
    done = {path.parent.name for path in folder.glob("*/result.json")}
    assert done == {"lr=0.002,seed=43", "lr=1e-06,seed=43"}
    assert not (folder / "best").exists()
    call(workers=2)
    assert len(list(folder.glob("lr*/result.json"))) == 4
    best = (folder / "best").resolve()
    assert best.name.startswith("lr=0.002") and (best / "model" / "config.json").is_file()
    assert [p.parent.name for p in folder.glob("lr*/model")] == [best.name]


def test_the_processes_of_a_pool_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    num_started = multiprocessing.get_context("spawn").Value("i", 0)
    for _ in range(3):
        command.take_device(num_started)
    assert taken == [0, 1, 0]


def test_tasks_of_pairs_start_from_the_pair_model(model: Path, data: Path, tmp_path: Path) -> None:
    config, state = export.load(model)
    start = {name: tensor + 0.01 for name, tensor in state.items()}
    pair_model = export.save(config, start, model / "vocab.txt", tmp_path / "pair-model")
    (tmp_path / "two.yaml").write_text(
        ROW.replace("tone", "two").replace("[sentence]", "[sentence, sentence]"), "utf-8"
    )
    tasks = (str(data / "tone.yaml"), str(tmp_path / "two.yaml"))
    out, settings = tmp_path / "out", {"lr": 1e-12, "epochs": 1}
    command.finetune(tasks, str(model), str(data), out, str(pair_model), **settings, limit=32)
    for task, begun in (("tone", state), ("two", start)):
        name = "bert.embeddings.word_embeddings.weight"
        assert torch.allclose(weights(out / task / "best")[name], begun[name], atol=1e-6)


def test_a_run_that_never_began_makes_room(model: Path, data: Path, tmp_path: Path) -> None:
    """A mistake in the command is mended without --force."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(UserError):
        run.run(run_spec(tmp_path / "model", data, tmp_path / "run", epochs=1), show=False)
    assert run.run(run_spec(model, data, tmp_path / "run", epochs=1), show=False)["epochs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("speed=1",), "with a key of lr, epochs"),
        (("lr=fast",), "could not convert"),
        (("epochs=5",), "both given"),
    ],
)
def test_mistakes_in_a_grid(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.parse_grid(words, {"epochs": 3})


def test_all_is_checked_before_the_first_run_is_trained(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """What the second task lacks is found while nothing is trained yet, in one message."""
    (tmp_path / "third.yaml").write_text(ROW.replace("tone", "third"), encoding="utf-8")
    (tmp_path / "runs" / "third" / "seed=42").mkdir(parents=True)
    (tmp_path / "runs" / "third" / "seed=42" / "mine.txt").touch()
    (tmp_path / "second.yaml").write_text(
        ROW.replace("tone", "second").replace("sentence", "absent"), encoding="utf-8"
    )
    tasks = (str(data / "tone.yaml"), *(str(tmp_path / f"{n}.yaml") for n in ("second", "third")))
    with pytest.raises(UserError) as caught:
        command.finetune(tasks, str(model), str(data), tmp_path / "runs", epochs=1)
    message = str(caught.value)
    assert message.startswith("nothing was trained, because 2 things are wrong: ")
    assert "absent" in message and "exists and is not a fine-tuning run" in message
    assert not (tmp_path / "runs" / "tone").exists()
    with pytest.raises(UserError, match="one thing is wrong: nowhere is not a directory"):
        command.finetune(tasks[:1], "nowhere", str(data), tmp_path / "runs", seeds=2)


def test_room_for_all_runs_is_looked_for_first(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 0, 10_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="2 runs in .* need up to .* are free there"):
        command.finetune((str(data / "tone.yaml"),), str(model), str(data), tmp_path, seeds=2)


def test_progress_inside_an_epoch_and_tensorboard(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    result = run.run(run_spec(model, data, tmp_path / "run", epochs=1))
    printed = capsys.readouterr().out
    steps = len(result["losses"])
    assert f"tone  step 2/{steps}, epoch {2 / steps:.1f} of 1  loss" in printed

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, steps + 1))
    (accuracy,) = events.Scalars("dev/accuracy")
    assert accuracy.step == steps
    assert accuracy.value == pytest.approx(result["best"]["accuracy"], abs=1e-6)
