"""The loop: equal losses on any number of ranks, initial weights, one message per mistake."""

from __future__ import annotations

import gzip
import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import make_corpus, pretrain_runs, read_log, run_ranks, tiny_config

from clue_ds import config as run_config
from clue_ds import export
from clue_ds.checkpoint.masters import load_weights
from clue_ds.errors import UserError
from clue_ds.model.weights import SEGMENT_EMBEDDINGS
from clue_ds.pretrain import start_weights, train
from clue_ds.vocab_file import vocab_lines, write_tokens

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Another order of the sums over sequences.
LOSS_TOLERANCE = 1e-5
PATIENCE_S = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("train"), sample_text)


def config_for(corpus: Path, run_dir: Path, **sections: Any) -> dict[str, Any]:
    model = {**NO_DROPOUT, **sections.pop("model", {})}
    return tiny_config(corpus, run_dir, model=model, **sections).model_dump()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Runs of one process: `one`, then `again` from `one`'s weights, `hf` from its export, and
    `diverged` with a rate that no run survives; and `two`, the same as `one` on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    one = config_for(corpus, folder / "one")
    assert run_ranks(1, pretrain_runs, [one]) == [[None]]
    config, state, vocab_file = load_weights(folder / "one")
    export.save(config, state, vocab_file, folder / "exported")
    more = [
        config_for(corpus, folder / "again", model={"init": str(folder / "one")}),
        config_for(
            corpus,
            folder / "hf",
            model={"init": str(folder / "exported")},
            train={"profile": [2, 3]},
        ),
        config_for(corpus, folder / "diverged", train={"lr": 1e30, "gradient_clipping": 0.0}),
    ]
    ((again, hf, diverged),) = run_ranks(1, pretrain_runs, more)
    assert (again, hf) == (None, None)
    (folder / "diverged.txt").write_text(str(diverged))
    two = config_for(corpus, folder / "two", train={"micro_batch_size": 1})
    assert run_ranks(2, pretrain_runs, [two]) == [[None]] * 2
    return folder


def test_losses_do_not_depend_on_ranks_or_parts(folder: Path) -> None:
    one = [line["loss"] for line in read_log(folder / "one")]
    two = [line["loss"] for line in read_log(folder / "two")]
    assert two == pytest.approx(one, abs=LOSS_TOLERANCE)
    for a, b in zip(read_log(folder / "one"), read_log(folder / "two"), strict=True):
        assert a["mlm_accuracy"] == pytest.approx(b["mlm_accuracy"], abs=0.03)
        assert a["samples"] == b["samples"]


def test_a_run_starts_from_another_runs_weights_and_from_its_export(folder: Path) -> None:
    fresh = read_log(folder / "one")[0]["loss"]
    again = [line["loss"] for line in read_log(folder / "again")]
    assert again[0] < fresh - 0.02
    assert [line["loss"] for line in read_log(folder / "hf")] == again


def test_a_segment_that_no_training_saw_gets_the_vector_of_the_first(folder: Path) -> None:
    """Not in the checkpoint, and not if the run started from a model that may have been trained
    with pairs."""
    opened = {name: export.open_model(folder / name) for name in ("one", "again")}
    saved = {name: load_weights(folder / name)[1] for name in opened}
    assert "token type 1" in opened["one"].notes[0] and not opened["again"].notes
    before, after = saved["one"].pop(SEGMENT_EMBEDDINGS), opened["one"].state_dict
    assert not torch.equal(before[0], before[1])
    assert torch.equal(after.pop(SEGMENT_EMBEDDINGS), before[0].expand_as(before))
    for one, other in ((after, saved["one"]), (opened["again"].state_dict, saved["again"])):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_chosen_steps_are_recorded(folder: Path) -> None:
    """The losses of that run are those of a run that records nothing: see the test above."""
    (path,) = (folder / "hf/profile").iterdir()
    assert path.name == "steps-2-3.json.gz"
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {n for n in names if str(n).startswith("ProfilerStep#")} == {
        "ProfilerStep#2",
        "ProfilerStep#3",
    }
    assert "aten::addmm" in names
    assert not (folder / "again/profile").exists()


def test_divergence_ends_the_run_with_the_step_and_saves_nothing(folder: Path) -> None:
    message = (folder / "diverged.txt").read_text()
    assert "the gradient is not finite at step 2 (samples 8 to 15 of the run)" in message
    assert "rank 0" in message and "smaller train.lr" in message
    assert not list((folder / "diverged").glob("checkpoints/step-00000006"))


def test_run_directory_holds_everything(folder: Path, corpus: Path) -> None:
    run = folder / "one"
    assert run_config.load(run / "config.yaml").model_dump() == config_for(corpus, run)
    keys = set(read_log(run)[0])
    assert keys >= {
        "step",
        "loss",
        "mlm_accuracy",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "data_wait_ms",
        "memory_gib",
        "samples",
        "elapsed_s",
    }


def test_weights_of_another_shape_or_vocabulary_are_refused(folder: Path, tmp_path: Path) -> None:
    config, _, vocab_file = load_weights(folder / "one")
    model = train.BertForPreTraining(config.replace(num_hidden_layers=1))
    with pytest.raises(UserError, match="num_hidden_layers is 2 there and 1 here"):
        start_weights.load(model, str(folder / "one"), vocab_file, True)
    model = train.BertForPreTraining(config)
    tokens = vocab_lines(vocab_file)
    other = tmp_path / "other.txt"
    write_tokens([*tokens[:-2], tokens[-1], tokens[-2]], other)
    for source in ("one", "exported"):
        with pytest.raises(UserError, match=f"another vocabulary .*id {len(tokens) - 2} is"):
            start_weights.load(model, str(folder / source), other, True)
    with pytest.raises(UserError, match="is not a directory"):
        start_weights.load(model, str(folder / "nowhere"), vocab_file, True)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "batch sizes": (
        {"train": {"global_batch_size": 9}},
        r"global_batch_size 9 is not divisible by .* set train.global_batch_size to 8 or 10",
    ),
    "length": (
        {"data": {"seq_length": 64}},
        "seq_length 64 exceeds the model's positions; set it to 32 or less",
    ),
    "no corpus": ({"data": {"corpus": "nowhere"}}, "nowhere"),
    "compiled at stage 3": (
        {"deepspeed": "zero3", "model": {"compile": True}},
        "model.compile is true, but DeepSpeed JSON zero3 has ZeRO stage 3",
    ),
    "stage": ({"deepspeed": "zero9"}, "neither one of zero0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_before_anything_starts(
    corpus: Path, tmp_path: Path, mistake: str
) -> None:
    sections, message = MISTAKES[mistake]
    config = run_config.validate(config_for(corpus, tmp_path / "run", **sections), "test")
    with pytest.raises(UserError, match=message):
        train.build(config)
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "run").exists()


def test_a_file_in_place_of_the_run_directory(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("something")
    with pytest.raises(UserError, match="is a file; give a directory"):
        train.build(tiny_config(corpus, tmp_path / "run"))


def test_a_truncated_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    (tmp_path / "corpus" / "corpus.json").unlink()
    with pytest.raises(UserError, match="corpus"):
        train.build(tiny_config(tmp_path / "corpus", tmp_path / "run"))


@pytest.mark.parametrize("flag", [["--local_rank=1"], ["--local-rank", "1"], []])
def test_local_rank_that_launchers_append_is_accepted(
    corpus: Path, tmp_path: Path, flag: list[str]
) -> None:
    path = tmp_path / "run.yaml"
    run_config.save(tiny_config(corpus, tmp_path / "run"), path)
    parsed = train.parse([*flag, "--config", str(path), "--train.lr", "1e-4"])
    assert parsed.train.lr == 1e-4


def test_ctrl_c_saves_even_if_it_also_ends_the_reader_of_the_output(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`clue-ds pretrain | tee log`: the terminal sends INT to both, and tee ends first."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "run.yaml"
    sections = {"train": {"steps": 10**6}, "checkpoint": {"every": 10**6}}
    run_config.save(tiny_config(corpus, tmp_path / "run", **sections), path)
    job = subprocess.Popen(
        [sys.executable, "-m", "clue_ds.pretrain.train", "--config", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Tests that a shell started in the background inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert job.stdout is not None
    while not job.stdout.readline().startswith(b"step"):
        assert job.poll() is None
    job.stdout.close()
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=PATIENCE_S) == 75
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert (checkpoint / "manifest.json").is_file()


def test_a_run_in_the_background_outlives_its_shell_keeps_others_out_and_stops_when_asked(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "run.yaml"
    sections = {"train": {"steps": 10**6}, "checkpoint": {"every": 10**6}}
    run_config.save(tiny_config(corpus, tmp_path / "run", **sections), path)
    command = [sys.executable, "-m", "clue_ds.pretrain.train", "--config", str(path)]
    # As after `nohup clue-ds pretrain ... &`, some steps, and the end of the connection.
    script = """"$@" > output.txt 2>&1 &
        while kill -0 $! && [ ! -e run/log.jsonl ]; do sleep 0.1; done"""
    subprocess.run(["sh", "-c", script, "sh", *command], cwd=tmp_path, check=True)

    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert second.returncode == 2
    asked = re.search(r"is in use: process (\d+) on .*kill -USR1 (\d+)", second.stderr)
    assert asked is not None and asked[1] == asked[2]

    subprocess.run(["kill", "-USR1", asked[1]], check=True)
    deadline = time.monotonic() + PATIENCE_S
    while "stopped on request" not in (output := (tmp_path / "output.txt").read_text()):
        assert time.monotonic() < deadline, output
        time.sleep(0.1)
    assert "saved " in output


def test_the_loop_can_be_read_in_one_sitting() -> None:
    assert len(inspect.getsource(train.train).splitlines()) <= 100
