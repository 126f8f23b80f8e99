"""What `auto` chooses on a GPU: kernels that agree, micro-batches that fit, exact dropout rates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ranks import make_corpus, run_ranks, tiny_config

from clue_ds.kernels import verify
from clue_ds.model import ops
from clue_ds.pretrain import batches, resume, train
from clue_ds.pretrain.auto import micro_batch

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
    sigma = math.sqrt(p * (1 - p) / (out.numel() * 128))
    assert abs(kept - (1 - p)) < 5 * sigma + 2e-4  # each share is rounded to bf16


def peaks(corpus: str, run_dir: str) -> dict[str, float]:
    """On a rank: bytes of some micro-batches, and the size that fits where 64 rows just do."""
    device = train.start()
    config = tiny_config(corpus, run_dir, train={"global_batch_size": 256, "precision": "bf16"})
    opened = batches.open_data(config)
    model = config.model.resolve(opened.vocab_size)
    identity = resume.RunIdentity(config, model, opened.vocab_file, "", True, "")
    stream = batches.make_stream(config, opened)
    network = micro_batch.network_of(identity, stream, device)
    trial = micro_batch.Trial(network, stream.batch(0), device)
    found = {str(size): trial.peak(size) for size in (16, 64, 256)}
    fit = micro_batch.largest_that_fits(256, trial.peak, found["64"])
    assert fit is not None
    return found | {"fit": fit.size}


def test_a_micro_batch_is_chosen_by_the_memory_that_it_takes(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, TEXT)
    (found,) = run_ranks(1, peaks, str(corpus), str(tmp_path / "run"))
    assert 0 < found["16"] <= found["64"] <= found["256"]
    assert found["fit"] >= 64
