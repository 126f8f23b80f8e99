"""How eager code launches a kernel: `kernel[grid](...)` without Triton's work in every call.

In every launch Triton binds arguments by name, specializes each of them in turn and formats a cache
key as text. Here the key is a tuple of what a compiled kernel depends on: the device, the
constants, the number of warps, each tensor's dtype and its address modulo 16, and the properties of
each integer that Triton specializes on. The first launch with a key goes through Triton, which
compiles the kernel and returns it; later ones launch that compiled kernel directly, as in Triton's
own tutorial on softmax.

Rejected: keys without addresses. A view that starts on an odd element would then run code that
loads 16 bytes at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import INTERPRETED


class Launcher:
    """One kernel, whose arguments are tensors, then integers, then constants.

    All tensors must be on one device; the kernel runs there.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int, ...],
        constants: tuple[Any, ...],
        num_warps: int,
    ) -> None:
        if INTERPRETED:
            self.kernel[grid](*tensors, *numbers, *constants)
            return
        anchor = next(tensor for tensor in tensors if tensor is not None)
        key: list[Any] = [anchor.device, num_warps, constants]
        for tensor in tensors:
            key.append(None if tensor is None else (tensor.dtype, tensor.data_ptr() & 15))
        for number in numbers:
            key.append((number == 1, number & 15 == 0, number < 2**31))
        known, whole_grid = tuple(key), (*grid, 1, 1)
        with torch.cuda.device_of(anchor):
            compiled = self.compiled.get(known)
            if compiled is not None:
                compiled[whole_grid](*tensors, *numbers, *constants)
            else:
                # With fused multiply-add, as aot/machine_code.py compiles the kernels that it
                # counts; Triton 3.10's default is off.
                self.compiled[known] = self.kernel[grid](
                    *tensors, *numbers, *constants, num_warps=num_warps, enable_fp_fusion=True
                )
