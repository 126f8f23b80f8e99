"""Attention for the benchmark: ours takes one packed tensor, peers three of them.

T: tokens   B: sequences   S: tokens of each   N: heads   D: head size

Peers are given what suits them: q, k and v as tensors of their own, so that none of them has to
take a packed tensor apart or to stack gradients. `flash`, `cudnn` and `math` are torch's
scaled_dot_product_attention at [B, N, S, D] with these backends, and `varlen` is the packed form of
the first. `cudnn` and `varlen` take head sizes that are multiples of 8. `eager` is the chain of
products, softmax and dropout, which `compile` compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Case

PACKED = ("ours", "torch")  # providers that take one tensor


def inputs_of(case: Case, device: torch.device, provider: str) -> list[Tensor]:
    """qkv [T, 3, N, D], or q, k and v [T, N, D], with the same numbers."""
    shape = (case.rows, 3, case.hidden // case.head_size, case.head_size)
    qkv = torch.randn(shape, device=device).to(case.dtype)
    parts = [qkv] if provider in PACKED else [part.contiguous() for part in qkv.unbind(1)]
    return [part.requires_grad_() for part in parts]


def _starts(case: Case, device: torch.device) -> Tensor:
    """int32 [B + 1]: every sequence is full."""
    return torch.arange(0, case.rows + 1, max(case.length, 1), dtype=torch.int32, device=device)


def packed(implementation: Any, case: Case, device: torch.device) -> Callable[..., Tensor]:
    """The operation of `functional` or `reference`."""
    starts = _starts(case, device)
    return lambda qkv: implementation.attention(qkv, starts, case.length, case.p)


def peers(case: Case, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Functions of q, k and v [T, N, D] that return [T, N, D]."""
    shape = (-1, case.length, case.hidden // case.head_size, case.head_size)

    def batched(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*parts: Tensor) -> Tensor:
            out = attend(*(part.view(shape).transpose(1, 2) for part in parts))
            return out.transpose(1, 2).reshape(parts[0].shape)

        return run

    def with_backend(backend: SDPBackend) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=case.p)

        return batched(attend)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2) * case.head_size**-0.5).softmax(-1)
        return torch.nn.functional.dropout(weights, case.p) @ v

    found = {"math": with_backend(SDPBackend.MATH), "eager": batched(eager)}
    found["compile"] = torch.compile(found["eager"], dynamic=False)
    if case.dtype in (torch.float16, torch.bfloat16):
        found["flash"] = with_backend(SDPBackend.FLASH_ATTENTION)
        if case.head_size % 8 == 0:
            found["varlen"] = _varlen(case, device)
            if case.p == 0.0:  # torch 2.11 rounds other rates to multiples of 1/16 here
                found["cudnn"] = with_backend(SDPBackend.CUDNN_ATTENTION)
    return found


def _varlen(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """torch's operator under `flash` on packed tensors, which has no public function with dropout.

    Its last positional arguments: dropout, whether it is causal, whether it returns its mask.
    """
    starts, length = _starts(case, device), case.length
    attend = torch.ops.aten._flash_attention_forward

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, starts, starts, length, length, case.p, False, False)[0]

    return run
