"""An operation's two entry points: an autograd function (eager) and a registered op (compiled).

A call through torch.library takes about 60 us longer, which is more than a kernel takes at BERT's
sizes, but Dynamo can't trace a launch. So an eager call launches the kernel directly, and a call
that is being compiled goes through `torch.ops.clue_ds.*`. That operation has a fake implementation
(shapes without data) and the same gradient formula.

Rejected: `torch.library.triton_op`, which fails opcheck and fullgraph compilation on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Launch = Callable[..., Any]
# Formula(launch of the backward pass) -> backward(ctx, *gradients of the outputs)
Formula = Callable[[Launch], Callable[..., Any]]


def define(
    name: str,
    forward: Launch,
    fake_forward: Launch,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Launch,
    fake_backward: Launch,
    formula: Formula,
) -> Callable[..., Any]:
    """Register clue_ds::NAME and clue_ds::NAME_backward; returns the function to call.

    `forward` returns a new tensor or a tuple of them: results first, then what `backward` reads.
    """
    op = torch.library.custom_op(f"clue_ds::{name}", forward, mutates_args=())
    op.register_fake(fake_forward)
    backward_op = torch.library.custom_op(f"clue_ds::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)

    def setup_compiled(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Without it, compiled code fills zeros as the gradient of each result that nobody uses,
        # and `backward` reads them.
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    op.register_autograd(formula(backward_op), setup_context=setup_compiled)

    # The autograd function's `forward` takes ctx: if it had a `setup_context` of its own, torch
    # would bind arguments by name, which takes 16 us per call.
    def run(ctx: Any, *inputs: Any) -> Any:
        ctx.set_materialize_grads(False)
        output = forward(*inputs)
        setup_context(ctx, inputs, output)
        return output

    plain, refusing = formula(backward), once_differentiable(formula(backward))

    def differentiate(ctx: Any, *gradients: Tensor | None) -> Any:
        # Second derivatives are refused. That takes 3 us, and is needed only in grad mode: without
        # it nobody can ask for one.
        return (refusing if torch.is_grad_enabled() else plain)(ctx, *gradients)

    members = {"forward": staticmethod(run), "backward": staticmethod(differentiate)}
    direct = type(f"{name}_direct", (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        if torch.is_grad_enabled():
            return direct.apply(*arguments)  # type: ignore[attr-defined]
        return forward(*arguments)

    return call


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """(rows, width) of x [..., H]."""
    return x.numel() // x.shape[-1], x.shape[-1]


def empty_like(x: Tensor) -> Tensor:
    """An uninitialized contiguous tensor of x's shape, dtype and device."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def fresh_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """int64 [1] on `device`: the caller's seed, or a draw of the device's default generator.

    With one draw per call, restoring the generator's state restores the masks, and a replayed CUDA
    graph draws new ones.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.tensor([seed], dtype=torch.int64, device=device)


def parameter_gradients(
    gradients: Tensor, dtypes: tuple[torch.dtype | None, ...]
) -> list[Tensor | None]:
    """The rows of `gradients` [n, H] in their parameters' dtypes; None where there is no parameter.

    Parameters usually have one dtype. Then there is a single cast, as each is a kernel on a GPU.
    """
    if len(set(dtypes)) == 1 and dtypes[0] is not None:
        return list(gradients.to(dtypes[0]).unbind())
    rows = zip(gradients.unbind(), dtypes, strict=True)
    return [None if dtype is None else row.to(dtype) for row, dtype in rows]
