"""The smallest run memorises its text: length 64, batch 8, 400 steps, MLM accuracy 1.0.

Five windows are seen 640 times each with other masks every time. At length 64 a window always
shows enough of its own text to tell which one it is, so every token can be known; a run that
doesn't get there lost a gradient, a mask or a moment somewhere.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from ranks import read_log

from clue_ds.checkpoint.masters import load_weights
from clue_ds.data import Corpus, SampleStream
from clue_ds.model.bert import BertForPreTraining

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
COMMANDS = (
    "vocab learn {examples}/sample.txt --output sample-vocab.txt --min-frequency 1 --size 600",
    "shard {examples}/sample.txt --vocab sample-vocab.txt --output sample-corpus",
    "pretrain --config {examples}/sample.yaml",
)


def test_sample_run_memorises_its_text(tmp_path: Path) -> None:
    for command in COMMANDS:
        words = command.format(examples=EXAMPLES).split()
        subprocess.run([sys.executable, "-m", "clue_ds.cli", *words], cwd=tmp_path, check=True)
    lines = read_log(tmp_path / "sample-run")
    assert lines[-1]["step"] == 400
    assert lines[0]["mlm_accuracy"] < 0.2
    # Each line is 20 steps, about 1,440 predictions; one of them may meet an unlucky mask.
    assert [round(line["mlm_accuracy"], 2) for line in lines[-5:]] == [1.0] * 5
    assert max(line["mlm_accuracy"] for line in lines[-5:]) == 1.0

    config, state, _ = load_weights(tmp_path / "sample-run")
    model = BertForPreTraining(config).eval()
    model.load_state_dict(state)
    stream = SampleStream(Corpus(tmp_path / "sample-corpus"), 64, 8, seed=1234, whole_word=False)
    batch = stream.batch(0)  # masks that the run never saw
    with torch.no_grad():
        output = model(**batch)
    assert output.num_predicted > 50
    assert output.num_correct == output.num_predicted
