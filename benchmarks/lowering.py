"""What inductor makes of a module for an H100: code, and the bytes and launches of every node.

Call `prepare` once, in a process in which fake_gpu.py is installed. `lower` compiles a module on
the meta device as if it were on "cuda", forward and backward; nothing runs and no machine code is
made.

How nodes are counted: a kernel that inductor writes is one launch, and so is one call of a library
(a matrix product of cuBLAS, FlashAttention forward, FlashAttention backward); each moves its inputs
and its results once. An operation of ours is opaque to inductor, so its Python code is run on
tensors without memory: every kernel that it launches counts, and so does every operation of torch
in it, and each moves its own inputs and results. Our attention backward, for instance, is two
launches that both read query, key and value. FlashAttention's is in truth three kernels, with a
buffer of fp32 between them, so the rule favours whoever uses libraries, which is the peer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clue_ds.benchmarks import counts, fake_gpu

OURS = "clue_ds::"
# In the code that inductor writes: its own kernels, and calls of libraries and of operations.
CALLS = re.compile(
    r"\.run\(|extern_kernels\.\w+\(|torch\.ops\.[\w.]+\(|\b(?:inductor_prims|aten)\.[\w.]+\("
)
META = torch.device("meta")


class Part(NamedTuple):
    """A module that is compiled as one graph, its inputs, and how often a step runs it."""

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    times: int


class Node(NamedTuple):
    """A node of inductor's schedule. `calls`: the name of a library's or our operation, or ""."""

    calls: str
    num_bytes: int
    hidden_launches: int = 0  # of an operation of ours, beyond the one call of it in the code

    @property
    def kind(self) -> str:
        """gemm, attention or other."""
        if "extern_kernels" in self.calls and "mm" in self.calls:
            return "gemm"
        is_attention = "flash" in self.calls or "clue_ds.attention" in self.calls
        return "attention" if is_attention else "other"


class Graph(NamedTuple):
    """One lowered graph: its code and its nodes."""

    code: str
    nodes: list[Node]


class _Captured(Exception):
    """Raised in place of running what was compiled."""


def prepare(graphs: list[Graph]) -> None:
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

    original = lowering.GraphLowering.codegen

    def codegen(self: Any) -> Any:
        out = original(self)
        graphs.append(Graph("", [_node_of(node) for node in self.scheduler.nodes]))
        return out

    def save(code: str) -> None:
        graphs[-1] = graphs[-1]._replace(code=code)

    fake_gpu._replace(lowering.GraphLowering, codegen=codegen, save_output_code=staticmethod(save))
    fake_gpu._replace(
        async_compile.AsyncCompile,
        triton=lambda self, name, source, device_str="cuda": Kernel(),
        wait=lambda self, scope: None,
    )


def _node_of(node: Any) -> Node:
    intermediate = getattr(node, "node", None)
    name = str(getattr(intermediate, "python_kernel_name", "") or "")
    operation = getattr(intermediate, "op_overload", None)
    if operation is not None and operation.name().startswith(OURS):
        launches = _launches_of(intermediate)
        return Node(name, sum(launch.num_bytes for launch in launches), len(launches) - 1)
    try:
        size = int(node.get_read_write_buffers_sizes())
    except (AttributeError, NotImplementedError, TypeError):
        size = 0
    return Node(name, size)


def _launches_of(intermediate: Any) -> list[counts.Launch]:
    """What an operation of ours launches; `intermediate` is its node in inductor's own terms."""
    from torch._inductor.ir import ir_node_to_tensor
    from torch._inductor.virtualized import V
    from torch._library.custom_ops import OPDEFS

    operation = intermediate.op_overload
    implementation = OPDEFS[operation.name().removesuffix(".default")]._init_fn
    with V.fake_mode:
        tensors = [ir_node_to_tensor(each) for each in intermediate.inputs]
        arguments, options = intermediate.unflatten_args(tensors, intermediate.constant_args)
        return counts.count_operation(lambda: implementation(*arguments, **options))


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
        _move_to_gpu(module)
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


def _move_to_gpu(module: Any) -> None:
    """What a traced graph makes by itself (seeds of dropout, ranges) is to be made on "cuda"."""
    for graph in (each.graph for each in module.modules() if hasattr(each, "graph")):
        for node in graph.nodes:
            if torch.device(node.kwargs.get("device") or "cpu") == META:
                node.kwargs = node.kwargs | {"device": torch.device("cuda", 0)}
    module.recompile()


def figures_of(graphs: list[Graph]) -> dict[str, float]:
    """Launches, calls that make them, and GB by kind of the graphs of one part."""
    num_calls, num_hidden = 0, 0
    sizes = {"gemm_gb": 0.0, "attention_gb": 0.0, "other_gb": 0.0}
    for graph in graphs:
        body = graph.code[graph.code.index("def call") :]
        num_calls += len(CALLS.findall(body))
        for node in graph.nodes:
            num_hidden += node.hidden_launches
            sizes[f"{node.kind}_gb"] += node.num_bytes / 1e9
    total = sum(sizes.values())
    return {"launches": num_calls + num_hidden, "calls": num_calls, **sizes, "gb": total}
