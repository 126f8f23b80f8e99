"""On one GPU, every DeepSpeed config we ship trains as fp32 on the CPU does, in each precision."""

# ruff: noqa: E402 (imports come after the check that pretraining's packages are installed)
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for name in ("deepspeed", "pydantic", "numba"):
    pytest.importorskip(name)

from ranks import make_corpus, read_log, tiny_config

from clue_ds import config as run_config
from clue_ds.data import Corpus, Loader, SampleStream
from clue_ds.model import BertForPreTraining
from clue_ds.model.init import initialize
from clue_ds.presets import get
from clue_ds.pretrain import ds_json

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = ("zero0", "zero1", "zero2", "zero3", "zero1_offload")
# For the losses of 6 steps, compared with fp32 on the CPU. TF32 is off; bf16 has 8 bits, fp16 11.
LOSS_TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, sample_text: str) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), sample_text)


# In every step the output of one layer is infinite.
OVERFLOWS = """
import math, sys
from clue_ds.pretrain import train

build = train.build

def spoiled(config):
    run = build(config)
    layer = run.engine.module.get_submodule("bert.encoder.layer.1.intermediate")
    layer.register_forward_hook(lambda module, inputs, output: output * math.inf)
    return run

train.build = spoiled
train.main(sys.argv[1:])
"""


def _losses(run_dir: Path, corpus: Path, device: str, **sections: Any) -> list[float]:
    model = {**NO_DROPOUT, **sections.pop("model", {})}
    config = tiny_config(corpus, run_dir, model=model, **sections)
    run_dir.mkdir(parents=True)
    run_config.save(config, run_dir / "in.yaml")
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, "-m", "clue_ds.pretrain.train", "--config", str(run_dir / "in.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line["loss"] for line in read_log(run_dir)]


@pytest.fixture(scope="module")
def cpu_losses(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[float]:
    return _losses(tmp_path_factory.mktemp("cpu") / "run", corpus, "cpu", deepspeed="zero0")


def _small_loss_scale(deepspeed: str, directory: Path) -> str:
    """A copy of a shipped DeepSpeed JSON; at its initial scale of 65536 the first steps overflow,
    which skips their updates."""
    values = ds_json.read(deepspeed)
    values["fp16"]["initial_scale_power"] = 8
    path = directory / f"{deepspeed}.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("precision", LOSS_TOLERANCE)
@pytest.mark.parametrize("deepspeed", CONFIGS)
def test_losses_equal_the_cpus(
    deepspeed: str, precision: str, tmp_path: Path, corpus: Path, cpu_losses: list[float]
) -> None:
    train = {"precision": precision}
    if precision == "fp16":
        deepspeed = _small_loss_scale(deepspeed, tmp_path)
    losses = _losses(tmp_path / "run", corpus, "cuda", deepspeed=deepspeed, train=train)
    assert losses == pytest.approx(cpu_losses, abs=LOSS_TOLERANCE[precision])


@pytest.mark.parametrize("deepspeed", ["zero0", "zero2", "zero3"])
def test_a_loss_scale_that_collapses_in_fp16_names_step_and_tensor(
    deepspeed: str, tmp_path: Path, corpus: Path
) -> None:
    train = {"precision": "fp16", "steps": 60}
    config = tiny_config(corpus, tmp_path / "run", deepspeed=deepspeed, train=train)
    run_config.save(config, tmp_path / "in.yaml")
    command = [sys.executable, "-c", OVERFLOWS, "--config", str(tmp_path / "in.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "fp16 training diverged at step " in done.stderr
    assert "rank 0: the output of bert.encoder.layer.1.intermediate" in done.stderr
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_batches_for_a_gpu_are_pinned_and_the_same(corpus: Path) -> None:
    stream = SampleStream(Corpus(corpus), seq_length=16, global_batch_size=8, seed=1)
    with Loader(stream, device=torch.device("cuda", 0)) as loader:
        found = next(loader)
    assert all(tensor.is_pinned() for tensor in found.values())
    expected = stream.batch(0)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_blocks_compute_the_same(
    tmp_path: Path, corpus: Path, cpu_losses: list[float]
) -> None:
    losses = _losses(tmp_path / "run", corpus, "cuda", model={"compile": True})
    assert losses == pytest.approx(cpu_losses, abs=LOSS_TOLERANCE["fp32"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("deepspeed", "precision"), [("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "bf16")]
)
def test_graphs_change_nothing(
    deepspeed: str, precision: str, accumulation: int, tmp_path: Path, corpus: Path
) -> None:
    """With dropout: a replayed graph draws the masks that the step draws without one."""
    size = tiny_config(corpus, tmp_path).train.global_batch_size // accumulation

    def losses(cuda_graph: str) -> list[float]:
        train = {"precision": precision, "micro_batch_size": size, "cuda_graph": cuda_graph}
        model = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
        return _losses(
            tmp_path / cuda_graph, corpus, "cuda", deepspeed=deepspeed, train=train, model=model
        )

    assert losses("auto") == pytest.approx(losses("off"), abs=1e-5)


@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_graphs_and_kernels_change_nothing_where_rows_get_longer(
    kernels: str, tmp_path: Path, corpus: Path
) -> None:
    """Rows without padding have several shapes in each phase, which share the graphs' memory."""
    sections: dict[str, Any] = {
        "data": {"samples": "documents"},
        "model": {"max_position_embeddings": 128},
        "phases": [{"until": 12}, {"data": {"seq_length": 128}}],
        "train": {"steps": 24, "micro_batch_size": 8},
    }
    expected = _losses(tmp_path / "cpu", corpus, "cpu", **sections)
    for cuda_graph in ("off", "auto"):
        model = {**sections["model"], "kernels": kernels}
        train = {**sections["train"], "cuda_graph": cuda_graph}
        own = {**sections, "model": model, "train": train}
        losses = _losses(tmp_path / cuda_graph, corpus, "cuda", **own)
        assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE["fp32"])


@pytest.mark.parametrize("attention", ["sdpa", "masked_softmax"])
def test_logits_equal_the_cpus(attention: str) -> None:
    config = get("roberta_tiny_clue")
    model = BertForPreTraining(config, attention=attention).eval()
    initialize(model, seed=0)
    draws = torch.Generator().manual_seed(0)
    input_ids = torch.randint(110, config.vocab_size, (4, 128), generator=draws)
    lengths = torch.tensor([128, 100, 3, 77])
    with torch.inference_mode():
        expected = model(input_ids, lengths=lengths).prediction_logits
        model.cuda()
        found = model(input_ids.cuda(), lengths=lengths.cuda()).prediction_logits.cpu()
    real = torch.arange(128)[None] < lengths[:, None]
    torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)
