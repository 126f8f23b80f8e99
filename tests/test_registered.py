"""Every operation in torch: gradcheck, opcheck, fullgraph compile, checkpointing, ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func, nop
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from clue_ds import kernels

SEED = 11


class Case(NamedTuple):
    """An operation as a function of its floating-point inputs, and the op registered for it."""

    call: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    op: str
    rest: Callable[[torch.device], tuple[Any, ...]]  # the registered op's other arguments


def _seed(device: torch.device) -> Tensor:
    return torch.tensor([SEED], device=device)


def _ids(device: torch.device) -> Tensor:
    return torch.tensor([[1, 4, 1], [0, 2, 3]], device=device)


def _starts(device: torch.device, first: int, total: int) -> Tensor:
    """Offsets of two sequences: `first` tokens, and the rest of `total`."""
    return torch.tensor([0, first, total], dtype=torch.int32, device=device)


def _offsets(x: Tensor, first: int) -> Tensor:
    return _starts(x.device, first, x.shape[0])


CASES = {
    "layer_norm": Case(
        lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
        [(3, 7), (7,), (7,)],
        "layer_norm",
        lambda device: (1e-5,),
    ),
    "bias_dropout_add_layer_norm": Case(
        lambda *t: kernels.bias_dropout_add_layer_norm(*t, 0.3, 1e-5, True, True, seed=SEED),
        [(3, 7), (7,), (3, 7), (7,), (7,)],
        "bias_dropout_add_layer_norm",
        lambda device: (_seed(device), 0.3, 1e-5, torch.float64, True),
    ),
    "masked_softmax": Case(
        lambda s: kernels.masked_softmax(
            s, key_lengths=torch.tensor([5, 2], device=s.device), scale=0.7, dropout_p=0.3,
            seed=SEED,
        ),
        [(2, 2, 3, 5)],
        "masked_softmax",
        lambda device: (None, torch.tensor([5, 2], device=device), _seed(device), 0.7, 0.3),
    ),
    "bias_gelu erf": Case(
        lambda x, b: kernels.bias_gelu(x, b), [(3, 7), (7,)], "bias_gelu", lambda device: (False,)
    ),
    "bias_gelu tanh": Case(
        lambda x, b: kernels.bias_gelu(x, b, "tanh"),
        [(3, 7), (7,)],
        "bias_gelu",
        lambda device: (True,),
    ),
    "embedding_layer_norm": Case(
        lambda *t: kernels.embedding_layer_norm(
            _ids(t[0].device), _ids(t[0].device) % 2, *t, 0.3, 1e-5, True, seed=SEED
        ),
        [(6, 5), (4, 5), (2, 5), (5,), (5,)],
        "embedding_layer_norm",
        lambda device: (_seed(device), 0.3, 1e-5, -1),
    ),
    "attention": Case(
        lambda qkv: kernels.attention(qkv, _offsets(qkv, 5), 5, 0.3, seed=SEED),
        [(7, 3, 2, 6)],
        "attention",
        lambda device: (_starts(device, 5, 7), _seed(device), 5, 0.3),
    ),
    "attention_to": Case(
        lambda q, kv: kernels.attention_to(
            q, kv, _offsets(q, 1), _offsets(kv, 5), 2, 5, 0.3, seed=SEED
        ),
        [(3, 2, 6), (7, 2, 2, 6)],
        "attention_to",
        lambda device: (_starts(device, 1, 3), _starts(device, 5, 7), _seed(device), 2, 5, 0.3),
    ),
}  # fmt: skip


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in case.shapes]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name: str, kernel_device: torch.device) -> None:
    case = CASES[name]
    assert torch.autograd.gradcheck(
        case.call, _inputs(case, torch.float64, kernel_device), fast_mode=True
    )


@pytest.mark.parametrize("name", CASES)
def test_registered_op_passes_opcheck(name: str, kernel_device: torch.device) -> None:
    case = CASES[name]
    inputs = _inputs(case, torch.float64, kernel_device)
    if case.op == "embedding_layer_norm":
        inputs = [_ids(kernel_device), _ids(kernel_device) % 2, *inputs]
    op = getattr(torch.ops.clue_ds, case.op).default
    # With static shapes only: the check with dynamic ones takes 10 s per case.
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_static",
    )
    torch.library.opcheck(op, (*inputs, *case.rest(kernel_device)), test_utils=tests)


@pytest.mark.parametrize("name", CASES)
def test_compiled_without_a_graph_break_equals_eager(
    name: str, kernel_device: torch.device
) -> None:
    case = CASES[name]
    inputs = _inputs(case, torch.float32, kernel_device)

    def first(*tensors: Tensor) -> Tensor:
        out = case.call(*tensors)
        return 2 * (out[0] if isinstance(out, tuple) else out)

    # Otherwise sizes that differ from those of the previous case would become symbols.
    torch.compiler.reset()
    compiled = torch.compile(first, fullgraph=True, backend="aot_eager", dynamic=False)
    ours, eager = compiled(*inputs), first(*inputs)
    assert torch.equal(ours, eager)
    dy = torch.randn_like(eager)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(eager, inputs, dy), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_compiled_code_makes_no_gradient_of_a_result_that_nobody_uses(
    kernel_device: torch.device,
) -> None:
    """It was a tensor of zeros as large as the activations, written and read again."""
    backward: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        backward.append(graph)
        return make_boxed_func(graph.forward)

    case = CASES["bias_dropout_add_layer_norm"]
    inputs = _inputs(case, torch.float32, kernel_device)
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=keep)
    compiled = torch.compile(lambda *t: case.call(*t)[0], fullgraph=True, backend=backend)
    compiled(*inputs).sum().backward()
    targets = [str(node.target) for graph in backward for node in graph.graph.nodes]
    assert "clue_ds.bias_dropout_add_layer_norm_backward.default" in targets
    assert not [name for name in targets if "zeros" in name or "full" in name]


def _leaves(*shapes: tuple[int, ...]) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [torch.randn(s, device=device, requires_grad=True) for s in shapes]


# For each operation a call, and its tensors for n rows (positions, queries) and a width of n + 4.
GROWING: dict[str, tuple[Callable[..., Tensor], Callable[[int], Any]]] = {
    "layer_norm": (
        lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
        lambda n: _leaves((2, n, n + 4), (n + 4,), (n + 4,)),
    ),
    "bias_dropout_add_layer_norm": (
        lambda *t: kernels.bias_dropout_add_layer_norm(*t, 0.3, 1e-5, True, True, seed=SEED)[0],
        lambda n: _leaves((2, n, n + 4), (n + 4,), (2, n, n + 4), (n + 4,), (n + 4,)),
    ),
    "masked_softmax": (
        lambda s: kernels.masked_softmax(
            s, key_lengths=torch.arange(s.shape[0], device=s.device), dropout_p=0.3, seed=SEED
        ),
        lambda n: _leaves((n + 1, 2, n, n + 4)),
    ),
    "bias_gelu": (kernels.bias_gelu, lambda n: _leaves((2, n, n + 4), (n + 4,))),
    "embedding_layer_norm": (
        lambda ids, *t: kernels.embedding_layer_norm(
            ids, ids % 2, *t, 0.3, 1e-5, True, padding_idx=0, seed=SEED
        ),
        lambda n: (
            lambda device: [
                torch.arange(2 * n, device=device).view(2, n) % 6,
                *_leaves((6, n + 4), (16, n + 4), (2, n + 4), (n + 4,), (n + 4,))(device),
            ]
        ),
    ),
    # Heads have one size in a model; the number of tokens and the longest sequence change.
    "attention": (
        lambda qkv: kernels.attention(qkv, _offsets(qkv, 1), qkv.shape[0], 0.3, seed=SEED),
        lambda n: _leaves((n + 1, 3, 2, 6)),
    ),
    "attention_to": (
        lambda q, kv: kernels.attention_to(
            q, kv, _offsets(q, 1), _offsets(kv, 1), q.shape[0], kv.shape[0], 0.3, seed=SEED
        ),
        lambda n: _leaves((n, 2, 6), (n + 1, 2, 2, 6)),
    ),
}


@pytest.mark.parametrize("name", GROWING)
def test_compiled_with_symbolic_shapes_equals_eager(name: str, kernel_device: torch.device) -> None:
    call, tensors_of = GROWING[name]
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: 2 * call(*t), fullgraph=True, backend=counter, dynamic=True)
    for n in (3, 5, 9):
        torch.manual_seed(n)
        inputs = tensors_of(n)(kernel_device)
        ours, eager = compiled(*inputs), 2 * call(*inputs)
        assert torch.equal(ours, eager)
        leaves, dy = [t for t in inputs if t.requires_grad], torch.randn_like(eager)
        for mine, theirs in zip(
            torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(eager, leaves, dy),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(mine, theirs)
    assert counter.frame_count == 1  # sizes are symbols, not constants


def test_checkpointing_draws_the_same_mask_again(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 8, 64, device=kernel_device).requires_grad_().unbind()
    weight, bias = torch.ones(64, device=kernel_device), torch.zeros(64, device=kernel_device)

    def block(x: Tensor, residual: Tensor) -> Tensor:
        return kernels.bias_dropout_add_layer_norm(
            x, None, residual, weight, bias, 0.5, 1e-12, True
        )

    torch.manual_seed(5)
    plain = torch.autograd.grad(block(x, residual).pow(3).sum(), x)
    torch.manual_seed(5)
    again = checkpoint(block, x, residual, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.pow(3).sum(), x)[0], plain[0])


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.weight, self.ln_bias = (nn.Parameter(torch.randn(16)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = kernels.bias_gelu(x, self.bias)
        out = kernels.layer_norm(out, self.weight, self.ln_bias, 1e-12)
        return kernels.bias_dropout_add_layer_norm(
            out, self.bias, x, self.weight, self.ln_bias, 0.0, 1e-12, True
        )


def test_parameters_may_be_empty_between_forward_and_backward(kernel_device: torch.device) -> None:
    """ZeRO-3 frees a parameter's data after forward and gathers it again before backward."""
    torch.manual_seed(0)
    block = _Block().to(kernel_device)
    x = torch.randn(5, 16, device=kernel_device)
    expected = torch.autograd.grad(block(x).pow(2).sum(), list(block.parameters()))
    full = [parameter.data for parameter in block.parameters()]
    loss = block(x).pow(2).sum()
    for parameter in block.parameters():
        parameter.data = torch.empty(0, device=kernel_device)
    for parameter, data in zip(block.parameters(), full, strict=True):
        parameter.data = data
    gradients = torch.autograd.grad(loss, list(block.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_under_autocast_bf16_meets_fp32_parameters(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    block, dense = _Block().to(kernel_device), nn.Linear(16, 16, device=kernel_device)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        out = block(dense(torch.randn(5, 16, device=kernel_device)))
    out.float().pow(2).sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def test_without_gradients_nothing_is_kept(kernel_device: torch.device) -> None:
    with torch.no_grad():
        out = _Block().to(kernel_device)(torch.randn(2, 16, device=kernel_device))
    assert not out.requires_grad and out.grad_fn is None
