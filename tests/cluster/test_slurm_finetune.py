"""A grid of fine-tuning as a real Slurm array: every job its share, the best chosen at the end."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch
from test_finetune import CONFIG, WORDS, examples

import clue_ds.export as export
from clue_ds.model import BertForPreTraining

SBATCH = Path(__file__).resolve().parents[2] / "slurm" / "finetune.sbatch"
ROW = "name: tone\ntext: [sentence]\nlabels: [好, 坏]\nbatch_size: 16\n"
PATIENCE_S = 240


def test_an_array_shares_a_grid_and_the_last_job_chooses(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (tmp_path / "tone.yaml").write_text(ROW, encoding="utf-8")
    torch.manual_seed(0)
    state = BertForPreTraining(CONFIG).state_dict()
    export.save(CONFIG, state, tmp_path / "vocab.txt", tmp_path / "bert")
    for split, count in (("train", 200), ("dev", 40)):
        rows = [{"sentence": text, "label": label} for text, label in examples(count, count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines, encoding="utf-8")

    # Three jobs, counted from 1, for four runs: one of them does two.
    command = ["sbatch", "--parsable", "--wait", "--time=10", "--cpus-per-task=1", "--array=1-3"]
    command += [f"--chdir={tmp_path}", str(SBATCH), "--task", "tone.yaml", "--model", "bert"]
    command += ["--data", ".", "--output", "out", "--epochs", "4"]
    command += ["--grid", "lr=2e-3,1e-7", "--seeds", "2"]
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=PATIENCE_S)
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, (done.stderr, logs)

    folder = tmp_path / "out" / "tone"
    runs = [path for path in folder.iterdir() if path.name != "best"]
    assert {path.name for path in runs} == {
        f"lr={lr},seed={seed}" for lr in ("0.002", "1e-07") for seed in (42, 43)
    }
    scores = {
        run.name: json.loads((run / "result.json").read_text())["best"]["accuracy"] for run in runs
    }
    best = (folder / "best").resolve()
    assert best.name.startswith("lr=0.002") and scores[best.name] == max(scores.values())
    assert [run.name for run in runs if (run / "model").exists()] == [best.name]
    assert "best: out/tone/best/model" in logs
