"""The FLOPs that a network really executes, and the rate of the fastest matrix product here.

MFU by the rule of clue_ds/metrics credits work that the network leaves out (most of the last block)
and knows nothing of padding. Counting what runs shows the difference, and the measured GEMM rate
shows how much of the device's arithmetic is used, on a CPU too, whose peak nobody publishes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

GEMM_SIZES = {"cuda": (4_096, 8_192), "cpu": (1_024, 1_536)}
REPEATS = {"cuda": 20, "cpu": 4}


def executed_flops(loss: Callable[[], Tensor]) -> int:
    """FLOPs of matrix products and attention in a forward and backward pass.

    A multiply-add counts as 2. `loss` must run eagerly, because compiled code is not seen; the
    gradients of the pass are left to the caller.
    """
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product of GEMM_SIZES, with torch's threads."""
    best = 0.0
    for size in GEMM_SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = min(_seconds(a, b) for _ in range(REPEATS[device.type]))
        best = max(best, 2 * size**3 / seconds)
    return best


def _seconds(a: Tensor, b: Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    torch.mm(a, b)
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
