"""Fine-tuning on a real Slurm: signalled, continued, and a grid as an array of jobs."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch
from jobs import PATIENCE_S, SBATCH, TIME, log_of, submit, wait_for_state
from safetensors.torch import load_file
from test_finetune import CONFIG, WORDS, examples

import clue_ds.export as export
from clue_ds.model import BertForPreTraining

FINETUNE = [SBATCH / "finetune.sbatch", "--task", "tone.yaml", "--model", "bert", "--data", "."]
ROW = "name: tone\ntext: [sentence]\nlabels: [好, 坏]\nbatch_size: 16\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, a task and its examples."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (tmp_path / "tone.yaml").write_text(ROW, encoding="utf-8")
    torch.manual_seed(0)
    state = BertForPreTraining(CONFIG).state_dict()
    export.save(CONFIG, state, tmp_path / "vocab.txt", tmp_path / "bert")
    for split, count in (("train", 200), ("dev", 40)):
        rows = [{"sentence": text, "label": label} for text, label in examples(count, count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_signalled_it_saves_requeues_and_ends_as_if_undisturbed(
    slurm: dict[str, str], folder: Path, workers: int
) -> None:
    """Two runs, one after the other or each in a process of its own."""
    options = ["--epochs", "60", "--seeds", "2", "--workers", str(workers), "--output"]
    whole = submit(slurm, folder, "--cpus-per-task=1", *FINETUNE, *options, "whole")
    wait_for_state(slurm, whole, folder, "COMPLETED")
    job = submit(slurm, folder, "--cpus-per-task=1", *FINETUNE, *options, "cut")
    epochs = folder / "cut" / "tone" / "seed=42" / "epochs.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not epochs.is_file() or len(epochs.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline, log_of(folder, job)
        time.sleep(0.05)
    # What --signal=USR1@120 does when time is nearly up.
    subprocess.run(["scancel", "--signal=USR1", job], env=slurm, check=True)
    wait_for_state(slurm, job, folder, "COMPLETED")

    text = log_of(folder, job)
    assert text.count("stopped on request after step") == workers, text
    assert text.count(f"putting job {job} back into the queue") == 1
    for seed in ("seed=42", "seed=43"):
        one, other = (folder / name / "tone" / seed for name in ("whole", "cut"))
        losses = [json.loads((run / "result.json").read_text())["losses"] for run in (one, other)]
        assert losses[0] == losses[1]
    one, other = (folder / name / "tone" / "best" for name in ("whole", "cut"))
    assert one.resolve().name == other.resolve().name
    weights = [load_file(best / "model" / "model.safetensors") for best in (one, other)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_an_array_shares_a_grid_and_the_last_job_chooses(
    slurm: dict[str, str], folder: Path
) -> None:
    # Three jobs, counted from 1, for four runs: one of them does two.
    command = ["sbatch", "--parsable", "--wait", TIME, "--cpus-per-task=1", "--array=1-3"]
    command += [f"--chdir={folder}", *map(str, FINETUNE), "--output", "out", "--epochs", "4"]
    command += ["--grid", "lr=2e-3,1e-7", "--seeds", "2"]
    done = subprocess.run(
        command, env=slurm, capture_output=True, text=True, timeout=2 * PATIENCE_S
    )
    logs = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, (done.stderr, logs)

    task = folder / "out" / "tone"
    runs = [path for path in task.iterdir() if path.name != "best"]
    assert {path.name for path in runs} == {
        f"lr={lr},seed={seed}" for lr in ("0.002", "1e-07") for seed in (42, 43)
    }
    scores = {
        run.name: json.loads((run / "result.json").read_text())["best"]["accuracy"] for run in runs
    }
    best = (task / "best").resolve()
    assert best.name.startswith("lr=0.002") and scores[best.name] == max(scores.values())
    assert [run.name for run in runs if (run / "model").exists()] == [best.name]
    assert "best model: out/tone/best/model" in logs
