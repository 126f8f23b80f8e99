"""Tasks under `clue-ds launch`: two ranks write what one writes, and continue what was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from test_finetune import examples
from test_finetune import model as model  # the fixture
from test_finetune_runs import data as data  # the fixture
from test_finetune_runs import same_weights, saved_steps

from clue_ds.tasks import Predictor
from clue_ds.tasks.finetune import command as finetune_command
from clue_ds.tasks.finetune import fit
from clue_ds.tasks.finetune.loop import Recipe
from clue_ds.tasks.finetune.run import RESULT
from clue_ds.tasks.predict import command as predict_command

CLUE_DS = str(Path(sys.executable).with_name("clue-ds"))
# The order of a sum, and so its last bit, depends on the number of threads.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PATIENCE_S = 120


def launch(*words: object) -> list[str]:
    return [CLUE_DS, "launch", "--local", "2", "--", *map(str, words)]


@pytest.fixture(scope="module")
def finetuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetuned") / "model"
    fit.fit(model, examples(64, 1), examples(8, 2), directory, Recipe(epochs=1))
    return directory


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 lines are 13 batches of 8, the last one of 5: unequal shares."""
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    rows = [{"id": f"x{n}", "text": text} for n, (text, _) in enumerate(examples(101, 7))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_launched_prediction_is_that_of_one_process(
    finetuned: Path, file: Path, tmp_path: Path
) -> None:
    words = ["predict", "--model", finetuned, "--file", file, "--batch-size", "8", "--output"]
    alone, both = tmp_path / "alone.jsonl", tmp_path / "both.jsonl"
    subprocess.run([CLUE_DS, *map(str, [*words, alone])], env=ENVIRONMENT, check=True)
    subprocess.run(launch(*words, both), env=ENVIRONMENT, check=True, timeout=PATIENCE_S)
    assert both.read_bytes() == alone.read_bytes()
    ids = [json.loads(line)["id"] for line in both.read_text(encoding="utf-8").splitlines()]
    assert ids == [f"x{n}" for n in range(101)]


def undisturbed(classifier: str, file: str, asked: list[str], directory: str) -> None:
    """On every rank: embed a file, and train without being killed."""
    path, out = Path(file), Path(directory, "2.npy")
    predict_command.predict(Path(classifier), file=path, output=out, embed=True, batch_size=8)
    finetune_to(asked, directory)


def finetune_to(asked: list[str], directory: str) -> None:
    """On every rank: what `clue-ds finetune` does."""
    finetune_command.main([*asked, "--output", directory])


def test_embeddings_agree_and_killed_training_continues_bit_for_bit(
    model: Path, data: Path, finetuned: Path, file: Path, tmp_path: Path
) -> None:
    """The kill comes when it comes: all that counts is the last state that was saved."""
    asked = ["--task", data / "tone.yaml", "--model", model, "--data", data, "--epochs", "40"]
    words = list(map(str, asked))
    run_ranks(2, undisturbed, str(finetuned), str(file), words, str(tmp_path / "whole"))
    alone = Predictor(finetuned).embed([text for text, _ in examples(101, 7)])
    # Sums in another order: batches of 32, another number of threads.
    assert np.load(tmp_path / "whole" / "2.npy") == pytest.approx(alone, abs=1e-5)

    command = launch("finetune", *words, "--output", tmp_path / "cut")
    whole, cut = (tmp_path / name / "tone" / "seed=42" for name in ("whole", "cut"))
    process = subprocess.Popen(command, env=ENVIRONMENT)
    deadline = time.monotonic() + PATIENCE_S
    while not saved_steps(cut) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()  # its guard ends the ranks
    process.wait()
    time.sleep(3)
    assert not (cut / RESULT).exists()
    step = saved_steps(cut)[0]
    run_ranks(2, finetune_to, words, str(tmp_path / "cut"))
    results = [json.loads((run / RESULT).read_text()) for run in (whole, cut)]
    assert results[0]["num_ranks"] == 2 and 0 < step < len(results[0]["losses"])
    assert results[1]["losses"] == results[0]["losses"]
    assert same_weights(whole, cut)
