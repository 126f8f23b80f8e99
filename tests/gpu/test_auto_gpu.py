"""What `auto` chooses on a GPU: kernels that agree, micro-batches that fit, exact dropout rates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import make_corpus, tiny_config

from clue_ds import config as run_config
from clue_ds.kernels import verify
from clue_ds.model import ops

TEXT = "今天的天气很好。\n我们一起去公园。\n\n公园里有很多花。\n大家都很高兴。\n"
TINY = verify.Shapes(
    num_sequences=64, seq_length=128, hidden_size=312, intermediate_size=1_248, num_heads=12,
    vocab_size=8_021,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_agrees_with_torch_on_this_device(dtype: torch.dtype) -> None:
    verdicts = verify.verify(TINY, dtype, torch.device("cuda"))
    assert [verdict for verdict in verdicts if not verdict.agrees] == []


@pytest.mark.parametrize("head_size", [26, 64])
@pytest.mark.parametrize("p", [0.1, 0.125])
def test_attention_drops_with_the_probability_that_was_asked_for(head_size: int, p: float) -> None:
    """cuDNN would drop 2/16 for 0.1. Equal scores and values of 1 show each row's share."""
    torch.manual_seed(0)
    shape = (64, 12, 128, head_size)
    query = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    value = torch.ones_like(query)
    out = ops.attention(query, query, value, None, p, True, "sdpa").float()[..., 0]
    kept = (out.double() * (1 - p)).mean().item()
    # FlashAttention draws bytes: on an H200 it dropped 26/256 for 0.1.
    assert abs(kept - (1 - p)) < 1 / 256


def test_a_dry_run_finds_a_micro_batch_by_trying(tmp_path: Path) -> None:
    """A tiny network's 256 rows fit into every GPU."""
    corpus = make_corpus(tmp_path, TEXT)
    train = {"global_batch_size": 256, "micro_batch_size": "auto", "precision": "bf16"}
    config = tmp_path / "in.yaml"
    run_config.save(tiny_config(corpus, tmp_path / "run", train=train), config)
    command = [sys.executable, "-m", "clue_ds.cli", "pretrain", "--config", str(config)]
    done = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train.micro_batch_size auto is 256" in done.stdout
