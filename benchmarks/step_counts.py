"""Launches, bytes and FLOPs of a compiled training step, from inductor's own schedule for an H100.

Run it with torch's CUDA build in an environment of its own, on a machine without a GPU:

    python3.12 -m venv env
    env/bin/pip install torch==2.11.0 transformers==5.17.0 "nvidia-cuda-crt==13.0.*" setuptools \\
        pydantic numba zstandard tyro pyarrow scipy rjieba OpenCC google-crc32c nltk psutil rich
    env/bin/pip install --no-deps --no-build-isolation -e .
    env/bin/python -m clue_ds.benchmarks.step_counts --output benchmarks/results/step_counts.json

fake_gpu.py makes torch believe in the device. Each part that `compile_blocks` compiles (embeddings,
block, last block, head with loss) is lowered as in training, forward and backward; bytes are what
the nodes of inductor's schedule read and write. A step is the sum of its parts. The peer is
transformers' BertForMaskedLM, compiled as a whole, without a mask. Both have bf16 weights and flash
attention. The optimizer is not counted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clue_ds import files, presets
from clue_ds.benchmarks import counts, fake_gpu
from clue_ds.benchmarks.description import describe
from clue_ds.benchmarks.sides import peer_network
from clue_ds.metrics import flops_per_token
from clue_ds.model import BertForPreTraining, ops
from clue_ds.model.bert import pad_vocab
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
)
BF16, META = torch.bfloat16, torch.device("meta")


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


class Part(NamedTuple):
    """A module that is compiled as one graph, its inputs, and how often a step runs it."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor | None, ...]
    times: int


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


def parts_of(shape: Shape) -> list[Part]:
    """What `compile_blocks` compiles, at this shape."""
    config, rows, length, p = shape.config, shape.num_rows, shape.length, shape.num_predictions
    with META:
        model = BertForPreTraining(config, padded_vocab_size=pad_vocab(config).vocab_size)
    model.to(BF16).train()
    optim.freeze_unused(model)

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


def peer_of(shape: Shape) -> list[Part]:
    size = (shape.num_rows, shape.length)
    ids, labels = (torch.empty(size, dtype=torch.long, device=META) for _ in range(2))
    with META:
        module = PeerLoss(shape.config)
    return [Part("whole model", module, (ids, labels), 1)]


class Graph(NamedTuple):
    """One lowered graph: its code, and (name of a library call or "", bytes) of every node."""

    code: str
    nodes: list[tuple[str, int]]


class _Captured(Exception):
    """Raised in place of running what was compiled."""


def _prepare_inductor(graphs: list[Graph]) -> None:
    """Let inductor leave its graphs in `graphs`, and make no machine code."""
    import torch._functorch.config as autograd_config
    from torch._inductor import async_compile
    from torch._inductor import config as inductor
    from torch._inductor import graph as lowering

    torch.autograd.set_multithreading_enabled(False)
    settings: dict[str, Any] = {
        "fx_graph_cache": False, "compile_threads": 1, "joint_graph_constant_folding": False,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(inductor, name, value)
    for name in ("enable_autograd_cache", "force_non_lazy_backward_lowering"):
        setattr(autograd_config, name, name.startswith("force"))

    class Kernel:
        def run(self, *arguments: Any, **options: Any) -> None: ...

    original, codes = lowering.GraphLowering.codegen, []

    def codegen(self: Any) -> Any:
        out = original(self)
        nodes = []
        for node in self.scheduler.nodes:
            name = getattr(getattr(node, "node", None), "python_kernel_name", "") or ""
            try:
                size = int(node.get_read_write_buffers_sizes())
            except (AttributeError, NotImplementedError, TypeError):
                size = 0
            nodes.append((str(name), size))
        graphs.append(Graph("", nodes))
        return out

    def save(code: str) -> None:
        codes.append(code)
        graphs[-1] = graphs[-1]._replace(code=code)

    fake_gpu._replace(lowering.GraphLowering, codegen=codegen, save_output_code=staticmethod(save))
    fake_gpu._replace(
        async_compile.AsyncCompile,
        triton=lambda self, name, source, device_str="cuda": Kernel(),
        wait=lambda self, scope: None,
    )


def lower(part: Part, graphs: list[Graph], uses_kernels: bool) -> list[Graph]:
    """The graphs, forward and backward, that inductor makes of a part."""
    from torch._inductor import compile_fx
    from torch._inductor import config as inductor
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def on_gpu(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        fake = torch.empty_strided(
            tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="cuda"
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_() if tensor.requires_grad else fake

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        with mode:
            fakes = [on_gpu(tensor) for tensor in inputs]
        context = torch._guards.tracing(torch._guards.TracingContext(mode))
        # As `compile_blocks` sets it.
        padding = inductor.patch(comprehensive_padding=not uses_kernels)
        with context, mode, padding:
            compile_fx.compile_fx(module, fakes)
        raise _Captured

    graphs.clear()
    torch._dynamo.reset()
    run = torch.compile(part.module, backend=backend, dynamic=False, fullgraph=True)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", counts.flash_attention):
            run(*part.inputs)
    except Exception as error:
        if _Captured.__name__ not in repr(error) + str(type(error)):
            raise
    assert len(graphs) == 2, f"{part.name}: {len(graphs)} graphs, not forward and backward"
    return list(graphs)


def figures_of(graphs: list[Graph]) -> dict[str, float]:
    """Launches and GB by kind of the graphs of one part."""
    launches, sizes = 0, {"gemm_gb": 0.0, "attention_gb": 0.0, "other_gb": 0.0}
    for graph in graphs:
        body = graph.code[graph.code.index("def call") :]
        calls = re.findall(r"\.run\(|extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(", body)
        launches += len(calls)
        for name, size in graph.nodes:
            is_gemm = "extern_kernels" in name and "mm" in name
            kind = "gemm" if is_gemm else "attention" if "flash" in name else "other"
            sizes[f"{kind}_gb"] += size / 1e9
    return {"launches": launches, **sizes, "gb": sum(sizes.values())}


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


def compiled(parts: list[Part], graphs: list[Graph], kernels: Kernels) -> dict[str, dict[str, Any]]:
    """The totals of each part; compiling does not change its FLOPs."""
    ops.choose_kernels("torch")
    flops = {
        name: {kind: figures[kind] for kind in ("gemm_tflop", "attention_tflop")}
        for name, figures in eager(parts).items()
    }
    ops.choose_kernels(kernels)
    try:
        return {
            part.name: figures_of(lower(part, graphs, kernels == "triton")) | flops[part.name]
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
    ours, peer = parts_of(shape), peer_of(shape)
    found: dict[str, Any] = dict(preset=shape.preset, rows=shape.num_rows, length=shape.length)
    found["eager"] = step_of(shape, ours, eager(ours))
    found["compiled"] = step_of(shape, ours, compiled(ours, graphs, "torch"))
    found["compiled, kernels"] = step_of(shape, ours, compiled(ours, graphs, "triton"))
    found["peer, eager"] = step_of(shape, peer, eager(peer))
    found["peer, compiled"] = step_of(shape, peer, compiled(peer, graphs, "torch"))
    best, theirs = found["compiled, kernels"]["step"], found["peer, compiled"]["step"]
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
    _prepare_inductor(graphs)
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
