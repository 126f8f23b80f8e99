"""Launches, bytes and FLOPs of a compiled training step, from inductor's own schedule for an H100.

Run it with torch's CUDA build in an environment of its own, on a machine without a GPU:

    python3.12 -m venv env
    env/bin/pip install torch==2.11.0 transformers==5.17.0 "nvidia-cuda-crt==13.0.*" setuptools \\
        pydantic numba zstandard tyro pyarrow scipy rjieba OpenCC google-crc32c nltk psutil rich
    env/bin/pip install --no-deps --no-build-isolation -e .
    env/bin/python -m clue_ds.benchmarks.step_counts --output benchmarks/results/step_counts.json

fake_gpu.py makes torch believe in the device. Each part that `compile_blocks` compiles (embeddings,
block, last block, head with loss) is lowered as in training, forward and backward; lowering.py says
what counts as a launch, and which bytes. A step is the sum of its parts. "packed" is the step of
`data.padding: remove`: the tokens of all rows in one buffer with `cu_seqlens` (here all rows are
full), and our kernel for attention, which takes heads of 26 as they are and writes one packed
gradient. The other forms are rows with FlashAttention, for which such heads are padded to 32. The
peer is transformers' BertForMaskedLM, compiled as a whole, without a mask. Both have bf16 weights.
The optimizer is not counted. Predicted times assume that our attention is as fast as
FlashAttention, which nobody has measured yet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clue_ds import files, presets
from clue_ds.benchmarks import counts, fake_gpu, lowering
from clue_ds.benchmarks.description import describe
from clue_ds.benchmarks.lowering import META, Graph, Part, figures_of, lower
from clue_ds.benchmarks.sides import peer_network
from clue_ds.metrics import flops_per_token
from clue_ds.model import BertForPreTraining, ops
from clue_ds.model.bert import pad_vocab
from clue_ds.model.packed_attention import Layout
from clue_ds.presets import Kernels, ModelConfig
from clue_ds.pretrain import optim

STUB = "CLUE_DS_STUB"  # in the environment of the process that counts
PEAK = 989e12
# preset, sequences, length
SHAPES = (
    ("roberta_tiny_clue", 1_024, 128),
    ("bert_base_clue", 512, 128),
    ("roberta_tiny_clue", 256, 512),
    ("bert_base_clue", 128, 512),
    ("roberta_large_clue", 64, 512),
)
BF16 = torch.bfloat16


class Shape(NamedTuple):
    preset: str
    num_rows: int
    length: int

    @property
    def config(self) -> ModelConfig:
        return presets.get(self.preset)

    @property
    def num_predictions(self) -> int:
        return -(-15 * self.length // 100)


class HeadAndLoss(nn.Module):
    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor | None, ...]:
        out = self.model._predict(hidden, labels)
        return out.loss, out.num_correct, out.num_predicted


class PeerLoss(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.network = peer_network(config).to(BF16).train()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.network(ids, labels=labels).loss


def model_of(config: ModelConfig) -> BertForPreTraining:
    with META:
        model = BertForPreTraining(config, padded_vocab_size=pad_vocab(config).vocab_size)
    model.to(BF16).train()
    optim.freeze_unused(model)
    return model


def parts_of(shape: Shape) -> list[Part]:
    """What `compile_blocks` compiles, at this shape."""
    config, rows, length, p = shape.config, shape.num_rows, shape.length, shape.num_predictions
    model = model_of(config)

    def hidden(positions: int) -> Tensor:
        size = (rows, positions, config.hidden_size)
        return torch.empty(size, dtype=BF16, device=META).requires_grad_()

    def ids(positions: int) -> Tensor:
        return torch.empty(rows, positions, dtype=torch.long, device=META)

    blocks = model.bert.encoder.layer
    return [
        Part("embeddings", model.bert.embeddings, (ids(length), None), 1),
        Part("block", blocks[0], (hidden(length), None), len(blocks) - 1),
        Part("last block", blocks[-1], (hidden(length), None, ids(p)), 1),
        Part("head and loss", HeadAndLoss(model), (hidden(p), ids(p)), 1),
    ]


def packed_parts_of(shape: Shape) -> list[Part]:
    """The same for rows that are laid end to end (data/flat.py), all of them full."""
    config, rows, length, p = shape.config, shape.num_rows, shape.length, shape.num_predictions
    model = model_of(config)

    def hidden(num: int) -> Tensor:
        return torch.empty(num, config.hidden_size, dtype=BF16, device=META).requires_grad_()

    def ids(num: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(num, dtype=dtype, device=META)

    tokens, queries, blocks = rows * length, rows * p, model.bert.encoder.layer
    layout = Layout(ids(rows + 1), ids(rows + 1), length, p, model.bert.attention)
    # `_flat_loss` gives the head one row of all queries.
    loss_inputs = (hidden(queries)[None].detach().requires_grad_(), ids(queries, torch.long)[None])
    return [
        Part("embeddings", model.bert.embeddings, (ids(tokens), None, ids(tokens)), 1),
        Part("block", blocks[0], (hidden(tokens), None, None, layout), len(blocks) - 1),
        Part("last block", blocks[-1], (hidden(tokens), None, ids(queries), layout), 1),
        Part("head and loss", HeadAndLoss(model), loss_inputs, 1),
    ]


def peer_of(shape: Shape) -> list[Part]:
    size = (shape.num_rows, shape.length)
    ids, labels = (torch.empty(size, dtype=torch.long, device=META) for _ in range(2))
    with META:
        module = PeerLoss(shape.config)
    return [Part("whole model", module, (ids, labels), 1)]


def eager(parts: list[Part]) -> dict[str, dict[str, float]]:
    """The totals of each part without torch.compile."""
    found = {}
    for part in parts:

        def loss(part: Part = part) -> Tensor:
            out = part.module(*part.inputs)
            return out[0] if isinstance(out, tuple) else out

        def as_scalar(loss: Callable[[], Tensor] = loss) -> Tensor:
            out = loss()
            return out if out.dim() == 0 else out.sum()

        with META:
            forward, backward = counts.count_eager(as_scalar)
        found[part.name] = counts.totals(forward.launches + backward.launches)
    return found


def compiled(
    parts: list[Part], graphs: list[Graph], kernels: Kernels, executed: dict[str, dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """The totals of each part; compiling does not change the FLOPs of the eager parts `executed`.

    Nor does laying rows end to end that are all full.
    """
    ops.choose_kernels(kernels)
    try:
        return {
            part.name: figures_of(lower(part, graphs, kernels == "triton"))
            | {kind: executed[part.name][kind] for kind in ("gemm_tflop", "attention_tflop")}
            for part in parts
        }
    finally:
        ops.choose_kernels("torch")


def step_of(shape: Shape, parts: list[Part], each: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sum of the parts, and what it predicts."""
    config, names = shape.config, each[parts[0].name]
    total = {n: sum(part.times * each[part.name][n] for part in parts) for n in names}
    head_size = config.hidden_size // config.num_attention_heads
    ms = counts.predicted_ms(total, config.hidden_size, head_size, shape.length)
    share = shape.num_predictions / shape.length
    rule = flops_per_token(config, shape.length, share) * shape.num_rows * shape.length
    executed = 1e12 * (total["gemm_tflop"] + total["attention_tflop"])
    step = {name: round(value, 3) for name, value in total.items()} | {
        "predicted_ms": round(ms, 2),
        "predicted_mfu": round(rule / (ms / 1e3) / PEAK, 4),
        "predicted_hfu": round(executed / (ms / 1e3) / PEAK, 4),
    }
    rounded = {n: {k: round(v, 4) for k, v in figures.items()} for n, figures in each.items()}
    return {"step": step, "parts": rounded}


def count(shape: Shape, graphs: list[Graph]) -> dict[str, Any]:
    """All figures of one shape."""
    ours, packed, peer = parts_of(shape), packed_parts_of(shape), peer_of(shape)
    found: dict[str, Any] = dict(preset=shape.preset, rows=shape.num_rows, length=shape.length)
    in_ours, in_peer = eager(ours), eager(peer)
    forms: dict[str, tuple[list[Part], dict[str, Any]]] = {
        "eager": (ours, in_ours),
        "compiled": (ours, compiled(ours, graphs, "torch", in_ours)),
        "compiled, kernels": (ours, compiled(ours, graphs, "triton", in_ours)),
        "packed, kernels": (packed, compiled(packed, graphs, "triton", in_ours)),
        "peer, eager": (peer, in_peer),
        "peer, compiled": (peer, compiled(peer, graphs, "torch", in_peer)),
    }
    for name, (parts, figures) in forms.items():
        found[name] = step_of(shape, parts, figures)
    best, theirs = found["packed, kernels"]["step"], found["peer, compiled"]["step"]
    found["bytes_of_peer"] = round(best["gb"] / theirs["gb"], 3)
    found["predicted_ratio"] = round(theirs["predicted_ms"] / best["predicted_ms"], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--preset", action="append", help="only these presets")
    options = parser.parse_args()
    if STUB not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            stub, driver = fake_gpu.build_stubs(Path(folder))
            more = {STUB: str(stub), "LD_PRELOAD": str(stub), "LD_LIBRARY_PATH": str(driver)}
            more["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
            command = [sys.executable, "-m", "clue_ds.benchmarks.step_counts", *sys.argv[1:]]
            status = subprocess.run(command, env={**os.environ, **more}).returncode
        sys.exit(status)
    fake_gpu.install(Path(os.environ[STUB]))
    graphs: list[Graph] = []
    lowering.prepare(graphs)
    shapes = [Shape(*values) for values in SHAPES]
    results = []
    for shape in shapes:
        if options.preset is None or shape.preset in options.preset:
            results.append(count(shape, graphs))
            print({k: v if not isinstance(v, dict) else v["step"] for k, v in results[-1].items()})
            # The device was never there.
            facts = describe() | {"gpu": None, "counted_for": fake_gpu.PROPERTIES.name}
            written = {"environment": facts, "benchmark": "step_counts", "shapes": results}
            files.write_json(options.output, written)


if __name__ == "__main__":
    main()
