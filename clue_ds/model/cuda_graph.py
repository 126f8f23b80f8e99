"""Forward and backward pass of a micro-batch as two CUDA graphs, replayed by the host in 1 ms.

A step of a small model has a thousand launches, and a host needs about 10 us for each: on an H200
the host, not the GPU, set the pace of BERT-base at 32,768 tokens (docs/performance.md).

tests/gpu/test_pretrain_gpu.py compares losses with and without graphs, and `clue-ds bench gpu`
measures both. Several GPUs have not run them yet, so `train.cuda_graph: auto` is for one.

Guarantees: the same kernels on the same numbers in the same order as without graphs, with the same
dropout masks (a graph reads the generator's state when it is replayed); a shape of micro-batch that
was not seen yet runs without a graph once, which also compiles what is compiled; evaluation never
runs in a graph.

Stages 0 to 2 only: ZeRO-3 gathers weights in the forward pass, at addresses that change.

Rejected: torch.cuda.make_graphed_callables. Its gradients share memory with the graph, so that
those of a second micro-batch would overwrite the ones that they are to be added to; and it
differentiates by the parameters themselves. DeepSpeed keeps the autograd node of each, which
belongs to the default stream, and a stream that is being captured must not wait for that one. A
second set of inputs, filled on a side stream while a step runs: the inputs of 131,072 tokens are
1.3 MB, which a GPU copies from pinned memory in 0.05 of tiny's 18.7 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from clue_ds.errors import UserError
from clue_ds.model.bert import PreTrainingOutput

LAST_STAGE = 2
# Passes on a side stream before the capture, as CUDA wants them: libraries make their workspaces.
WARM_UP_PASSES = 2
# Beside the memory of the graphs, a shape that was not seen yet runs once without one.
MEMORY_FACTOR = 2
# Rows without padding have 16 shapes (data/flat.py), and each phase of a run has its own.
MAX_GRAPHS = 64


def takes_graphs(setting: str, device: torch.device, stage: int, world_size: int) -> bool:
    """Whether a run with this `train.cuda_graph` replays graphs; UserError if it can't and must."""
    can = device.type == "cuda" and stage <= LAST_STAGE
    if setting == "on" and not can:
        raise UserError(
            f"train.cuda_graph on needs a CUDA device and ZeRO stage 0 to {LAST_STAGE}, and this "
            f"run has {device.type} and stage {stage}; set it to auto"
        )
    return can and (setting == "on" or (setting == "auto" and world_size == 1))


class GraphedForward:
    """Takes the place of `model.forward`; `active` False runs the model itself."""

    def __init__(self, model: nn.Module) -> None:
        self.active = True
        self._model = model
        self._forward: Callable[..., PreTrainingOutput] = model.forward
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._graphs: dict[Any, _Graph | None] = {}  # None: seen once
        # One pool of memory for all graphs: no two are ever between forward and backward pass.
        self._pool: Any = None

    def __call__(self, **inputs: Tensor) -> PreTrainingOutput:
        if not (self.active and self._model.training and torch.is_grad_enabled()):
            return self._forward(**inputs)
        key = tuple(_key(name, tensor) for name, tensor in sorted(inputs.items()))
        if key not in self._graphs:
            if len(self._graphs) < MAX_GRAPHS:
                self._graphs[key] = None
            return self._forward(**inputs)
        graph = self._graphs[key]
        if graph is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            body = _Body(self._model, self._forward)
            graph = self._graphs[key] = _Graph(body, self._parameters, inputs, self._pool)
        for name, tensor in inputs.items():
            graph.inputs[name].copy_(tensor, non_blocking=True)
        return graph.rebuild(_Replay.apply(graph, *self._parameters.values()))  # type: ignore[no-untyped-call]


def _key(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """What a graph depends on. Values on the host become constants of the graph."""
    return name, tensor.shape, tensor.dtype, () if tensor.is_cuda else tuple(tensor.tolist())


class _Body(nn.Module):
    """`forward` of `model`, without the hooks that DeepSpeed has put around it."""

    def __init__(self, model: nn.Module, forward: Callable[..., PreTrainingOutput]) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, **inputs: Tensor) -> PreTrainingOutput:
        return self._forward(**inputs)


class _Graph:
    """The two graphs of one shape, and the tensors they read and write."""

    def __init__(
        self,
        body: _Body,
        parameters: dict[str, nn.Parameter],
        inputs: dict[str, Tensor],
        pool: Any,
    ) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        random_state = torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The parameters' memory under nodes of autograd that belong to this stream.
            twins: dict[str, Tensor] = {
                f"model.{n}": nn.Parameter(p.detach()) for n, p in parameters.items()
            }
            leaves = list(twins.values())

            def forward() -> PreTrainingOutput:
                return functional_call(body, twins, (), self.inputs)

            for _ in range(WARM_UP_PASSES):
                loss = forward().loss
                assert loss is not None
                torch.autograd.grad(loss, leaves, torch.ones_like(loss))
            del loss
        torch.cuda.current_stream().wait_stream(stream)

        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: meanwhile the loader's thread may pin memory, and NCCL's look at events.
        options: dict[str, Any] = {
            "pool": pool,
            "stream": stream,
            "capture_error_mode": "thread_local",
        }
        with torch.cuda.graph(self.forward_graph, **options):
            output = forward()
            assert output.loss is not None
            self.loss_gradient = torch.ones_like(output.loss)
        with torch.cuda.graph(self.backward_graph, **options):
            self.gradients = torch.autograd.grad(output.loss, leaves, self.loss_gradient)
        self.output = PreTrainingOutput(*(None if t is None else t.detach() for t in output))
        torch.cuda.set_rng_state(random_state)

    def results(self) -> tuple[Tensor, ...]:
        """Copies of the output's tensors, because the next replay overwrites them."""
        return tuple(tensor.clone() for tensor in self.output if tensor is not None)

    def rebuild(self, results: tuple[Tensor, ...]) -> PreTrainingOutput:
        """The output that `results` are the tensors of."""
        present = iter(results)
        return PreTrainingOutput(*(None if t is None else next(present) for t in self.output))


class _Replay(torch.autograd.Function):
    """(graph, *parameters) -> the output's tensors, the loss first."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        graph.forward_graph.replay()
        results = graph.results()
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *others: Tensor) -> tuple[Any, ...]:
        graph: _Graph = ctx.graph
        graph.loss_gradient.copy_(loss_gradient)
        graph.backward_graph.replay()
        # Copies, in a few launches: autograd may keep them as `grad` until the next replay.
        return None, *torch._foreach_mul(graph.gradients, 1.0)
