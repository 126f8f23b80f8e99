"""Which implementation of an operation runs: the Triton kernel or the reference in plain torch.

"auto" takes the kernel for CUDA tensors (except where `is_host_bound`, and for operations that were
refused) and the reference for all others; "torch" always takes the reference, "triton" always the
kernel. A kernel runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1 in the
environment before `clue_ds.kernels` is imported). That is for tests: it is thousands of times
slower than torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when it decorates a kernel, so later changes have no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

# One program holds a whole row in registers; at 16384 columns the backward pass spills, as it would
# need 64 warps. Widths are tested up to this one; wider rows take the reference.
MAX_WIDTH = 4_096

# LayerNorm, forward and backward, moves 14 bytes per element with torch's kernels and 10 with ours.
# Up to this number of elements, that saves less time than an autograd function in Python costs the
# host, which is 28 us.
HOST_BOUND_ELEMENTS = 4_096 * 1_024

_backend = "auto"
_refused: frozenset[str] = frozenset()


def available() -> bool:
    """Whether kernels can run: this needs Triton, and a CUDA device or the interpreter."""
    return HAS_TRITON and (INTERPRETED or torch.cuda.is_available())


def set_backend(name: str) -> None:
    """Choose for this process: "auto", "triton" or "torch".

    Raises ValueError for another name, RuntimeError for "triton" where kernels can't run.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} is not one of {', '.join(BACKENDS)}")
    if name == "triton" and not available():
        missing = "a CUDA device" if HAS_TRITON else "the package triton"
        raise RuntimeError(f"kernels 'triton' need {missing}; choose 'auto' or 'torch' here")
    _backend = name


def get_backend() -> str:
    """The name last given to `set_backend`; "auto" at the start."""
    return _backend


def refuse(operations: Iterable[str]) -> None:
    """From now on "auto" takes the reference for exactly these operations, in this process."""
    global _refused
    _refused = frozenset(operations)


def refused() -> frozenset[str]:
    """The operations last given to `refuse`."""
    return _refused


def use_triton(x: Tensor, width: int, operation: str = "") -> bool:
    """Whether an operation on `x`, whose rows have `width` elements, runs the Triton kernel."""
    if _backend == "torch" or width > MAX_WIDTH or width == 0:
        return False
    if _backend == "triton":
        return True
    return operation not in _refused and takes_kernels(x.device)


def takes_kernels(device: torch.device) -> bool:
    """Whether "auto" takes kernels for tensors on this device."""
    return device.type == "cuda" and HAS_TRITON and not INTERPRETED


def is_host_bound(x: Tensor, weight: Tensor | None) -> bool:
    """Whether "auto" leaves LayerNorm of `x` to torch, because `x` is small and the call is eager.

    Torch's eager call is shorter than ours; in compiled code there is no such call. Parameters of
    another dtype than x's take the kernel, since torch would have to cast them first.
    """
    if _backend != "auto" or torch.compiler.is_compiling():
        return False
    return x.numel() <= HOST_BOUND_ELEMENTS and (weight is None or weight.dtype == x.dtype)
