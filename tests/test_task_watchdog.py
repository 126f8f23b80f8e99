"""Fine-tuning and prediction on two ranks, one of which goes wrong: nobody waits for it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from ranks import run_ranks
from test_finetune import examples
from test_finetune import model as model  # the fixture
from test_finetune_runs import data as data  # the fixture
from test_finetune_runs import same_weights, saved_steps
from test_task_ranks import CLUE_DS, ENVIRONMENT, PATIENCE_S, finetune_to
from test_watchdog import two_ranks
from zygote import Zygote

from clue_ds.tasks.finetune import command, fit
from clue_ds.tasks.finetune.loop import Recipe
from clue_ds.tasks.finetune.run import RESULT

FINETUNE = """
from clue_ds.tasks import encoded
from clue_ds.tasks.finetune import command, loop

encoded.encode = breaks("setup", encoded.encode)
loop._step = breaks("step", loop._step, after=3)
loop._save = breaks("save", loop._save)
command.main(sys.argv[3:])
"""
PREDICT = """
from clue_ds.tasks.predict import command
from clue_ds.tasks.predict.predictor import Predictor

Predictor.raws = breaks("predict", Predictor.raws)
command.main(sys.argv[3:])
"""
QUICK = ["--health.beat-seconds", "20", "--health.step-seconds", "30"]


@pytest.mark.parametrize(
    ("accident", "place", "status", "text"),
    [
        pytest.param(
            *("is stopped", "setup", 72, "is stopped (SIGSTOP) and has been silent for"),
            marks=pytest.mark.heavy,
        ),
        ("is stopped", "step", 72, "is stopped (SIGSTOP) and has been silent for"),
        ("raises", "step", 70, "raised ValueError: the third shard is unreadable"),
        pytest.param("spins", "save", 72, "in save after step", marks=pytest.mark.heavy),
    ],
)
def test_finetuning(
    zygote: Zygote,
    model: Path,
    data: Path,
    tmp_path: Path,
    accident: str,
    place: str,
    status: int,
    text: str,
) -> None:
    words = ["--task", data / "tone.yaml", "--model", model, "--data", data, "--epochs", "40"]
    arguments = [*map(str, words), "--output", str(tmp_path / "out"), *QUICK]
    (status_0, said), _ = two_ranks(zygote, FINETUNE, accident, place, arguments, tmp_path)
    assert status_0 == status, said
    assert f"clue-ds finetune: error: rank 1 on {socket.gethostname()} " in said
    assert text in said
    if accident == "spins":
        assert "in spin_for_ever" in said


def test_prediction(zygote: Zygote, model: Path, tmp_path: Path) -> None:
    fit.fit(model, examples(8, 1), examples(8, 2), tmp_path / "m", Recipe(epochs=1))
    rows = [json.dumps({"text": text}) for text, _ in examples(40, 3)]
    (tmp_path / "in.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = ["--model", tmp_path / "m", "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out"]
    (status, said), _ = two_ranks(
        zygote, PREDICT, "is stopped", "predict", [*map(str, words), *QUICK], tmp_path
    )
    assert status == 72, said
    assert f"clue-ds predict: error: rank 1 on {socket.gethostname()} is stopped" in said


@pytest.mark.parametrize("workers", [1, 2])
def test_finetuning_without_a_launcher_saves_and_stops_on_a_signal(
    model: Path, data: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process, or the owner of a pool; it used to die of TERM with what it had saved before."""
    places = [tmp_path / "tone" / f"seed={seed}" for seed in range(42, 42 + workers)]

    def ask() -> None:
        while not all(map(saved_steps, places)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = list(map(signal.getsignal, numbers))
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        names = ((str(data / "tone.yaml"),), str(model), str(data), tmp_path)
        command.finetune(*names, epochs=300, seeds=workers, workers=workers)
    assert end.value.code == 75
    assert list(map(signal.getsignal, numbers)) == before
    said = capsys.readouterr().out
    for place in places:
        step = saved_steps(place)[0]
        assert f"{place}: stopped on request after step {step} of 3900; the same command" in said
        assert not (place / RESULT).exists()


@pytest.mark.heavy
def test_a_job_that_is_asked_to_stop_saves_and_continues_bit_for_bit(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """USR1 to the launcher of one rank, as a batch system sends it before its time limit."""
    asked = ["--task", data / "tone.yaml", "--model", model, "--data", data, "--epochs", "120"]
    words = list(map(str, asked))
    command = [CLUE_DS, "launch", "--", "finetune", *words, "--output"]
    cut, whole = (tmp_path / name / "tone" / "seed=42" for name in ("cut", "whole"))
    job = subprocess.Popen(
        [*command, str(tmp_path / "cut")], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + PATIENCE_S
    while not saved_steps(cut) and job.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGUSR1)
    output, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 75, output
    assert "the same command continues" in output
    for directory in (tmp_path / "cut", tmp_path / "whole"):
        run_ranks(1, finetune_to, words, str(directory))
    results = [json.loads((run / RESULT).read_text()) for run in (whole, cut)]
    assert results[0]["losses"] == results[1]["losses"]
    assert same_weights(whole, cut)
