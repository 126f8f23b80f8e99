"""Which implementation of an operation runs: the Triton kernel or its plain-torch twin.

`auto` is Triton for CUDA tensors (but see `is_host_bound`) and torch for all others, `torch` always
the twin, `triton` always the kernel. A CPU tensor can take a kernel only in Triton's interpreter
(TRITON_INTERPRET=1 in the environment before `clue_ds.kernels` is imported), which is for tests: it
is thousands of times slower than torch.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton decides when a kernel is decorated, so the variable counts as it was at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")

# A fused row lives in the registers of one program; at 16384 the backward pass spills (and would
# want 64 warps). Up to here every width is tested; wider rows go to torch.
MAX_WIDTH = 4_096

# A LayerNorm forward and backward moves 14 bytes an element with torch's kernels and 10 with ours:
# up to here that gains less than an autograd function in Python costs the host, 28 us.
HOST_BOUND_ELEMENTS = 4_096 * 1_024

_backend = "auto"


def available() -> bool:
    """True where kernels can run: Triton is installed, and a CUDA device or the interpreter."""
    return HAS_TRITON and (INTERPRETED or torch.cuda.is_available())


def set_backend(name: str) -> None:
    """Choose for this process: "auto", "triton" or "torch".

    Raises ValueError for another name, RuntimeError for "triton" where kernels can't run.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"kernel backend {name!r} is none of {', '.join(BACKENDS)}")
    if name == "triton" and not available():
        missing = "a CUDA device" if HAS_TRITON else "the package triton"
        raise RuntimeError(f"kernels 'triton' need {missing}; 'auto' or 'torch' runs without")
    _backend = name


def get_backend() -> str:
    """What `set_backend` chose last; "auto" at the start."""
    return _backend


def use_triton(x: Tensor, width: int) -> bool:
    """Whether an operation on `x`, whose rows have `width` elements, runs as a kernel."""
    if _backend == "torch" or width > MAX_WIDTH or width == 0:
        return False
    if _backend == "triton":
        return True
    return x.is_cuda and HAS_TRITON and not INTERPRETED


def is_host_bound(x: Tensor, weight: Tensor | None) -> bool:
    """Whether "auto" leaves LayerNorm of `x` to torch, whose eager call is shorter, for its size.

    Compiled code has no such call. Parameters of another dtype would cost torch casts.
    """
    if _backend != "auto" or torch.compiler.is_compiling():
        return False
    return x.numel() <= HOST_BOUND_ELEMENTS and (weight is None or weight.dtype == x.dtype)
