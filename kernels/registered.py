"""An operation's two doors: the autograd function for eager, the registered op for torch.compile.

Crossing torch.library costs about 60 us a call, more than a kernel at BERT's sizes; Dynamo can't
trace a launch. So eager calls launch directly, and a call that is being compiled goes through
`torch.ops.clue_ds.*`, which has a fake (shapes without data) and the same gradient formula.

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
    """Register clue_ds::NAME and clue_ds::NAME_backward; returns what to call.

    `forward` returns a tuple of fresh tensors: results first, then what only `backward` reads.
    """
    op = torch.library.custom_op(f"clue_ds::{name}", forward, mutates_args=())
    op.register_fake(fake_forward)
    backward_op = torch.library.custom_op(f"clue_ds::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)
    op.register_autograd(formula(backward_op), setup_context=setup_context)

    def setup_direct(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_direct),
        "backward": staticmethod(once_differentiable(formula(backward))),
    }
    direct = type(f"{name}_direct", (torch.autograd.Function,), members)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        return direct.apply(*arguments)  # type: ignore[attr-defined]

    return call


def rows_of(x: Tensor) -> Tensor:
    """x [..., H] as a contiguous [M, H]; a copy only where the rows don't lie one after another."""
    # -1 is ambiguous where M = 0.
    return x.reshape(x.numel() // max(x.shape[-1], 1), x.shape[-1]).contiguous()


def fresh_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """int64 [1] on `device`: the caller's, or drawn from torch's default generator of the device.

    One draw a call, so that restoring the generator's state restores the masks, and a replayed
    CUDA graph draws new ones.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.tensor([seed], dtype=torch.int64, device=device)
