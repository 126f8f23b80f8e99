"""What an earlier version wrote still opens, verifies and continues (tests/data/README.md)."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from clue_ds.checkpoint.masters import load_weights
from clue_ds.data import Corpus

ARCHIVE = Path(__file__).parent / "data" / "before_rooms.tar.xz"
COMPARED = ("grad_norm", "lr", "samples")
# Earlier versions logged the sum over all slots for predictions, of which this share is used here.
USED_SLOTS = 0.9


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_corpus_of_an_earlier_version_opens_and_verifies(old: Path) -> None:
    corpus = Corpus(old / "corpus")
    corpus.verify()
    assert (corpus.num_tokens, corpus.num_documents) == (273, 4)


def test_run_of_an_earlier_version_continues_as_if_undisturbed(old: Path) -> None:
    command = [sys.executable, "-m", "clue_ds.cli", "pretrain", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=old, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step 3" in done.stdout
    logs = [
        [json.loads(line) for line in path.read_text("utf-8").splitlines()][-3:]
        for path in (old / "log.jsonl", old / "run" / "log.jsonl")
    ]
    for then, now in zip(*logs, strict=True):
        assert [now[key] for key in COMPARED] == pytest.approx([then[key] for key in COMPARED])
        assert now["loss"] == pytest.approx(then["loss"] / USED_SLOTS)
    _, state, _ = load_weights(old / "run")
    expected = safetensors.torch.load_file(old / "weights_after_6_steps.safetensors")
    for name, tensor in expected.items():
        # The same machine gives the same bits; another kind of processor adds in another order.
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-7)
