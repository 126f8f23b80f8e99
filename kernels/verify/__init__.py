"""Compares each kernel with its torch twin on the device that is to run it.

`verify` runs every operation of operations.py once as a kernel and once in torch, result and
gradients, at the shapes and in the dtype of a run, and holds the kernel to the error rule of
rule.py. What fails is named with its reason, and `backend.refuse` then makes "auto" take torch for
it. A kernel that raises (it does not compile for this device, say) fails too.

`remembered` keeps the answers in the user's cache, by everything that could change them: device,
driver, torch, CUDA, Triton, this package (its version and its kernels' text), dtype and shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backend, functional, reference
from .operations import CASES, Draw, Shapes
from .rule import judge

# Where the drivers of NVIDIA and AMD say their version.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


class DeviceFailed(RuntimeError):
    """A kernel left the device unusable for this process; the message names the operation."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`error`: the kernel's RMS error divided by torch's, for the worst of result and gradients.

    `reason`: why the kernel is not used; empty if it agrees.
    """

    operation: str
    error: float
    reason: str = ""

    @property
    def agrees(self) -> bool:
        return not self.reason


def verify(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Verdict]:
    """Compare every operation at these shapes; leaves the random state as it was.

    DeviceFailed when nothing can run on the device any more.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _every_kernel():
        torch.manual_seed(0)
        return [_verdict(name, shapes, Draw(dtype, device)) for name in CASES]


@contextlib.contextmanager
def _every_kernel() -> Iterator[None]:
    before = backend.get_backend()
    backend.set_backend("triton")  # which ignores what was refused
    try:
        yield
    finally:
        backend.set_backend(before)


def _verdict(name: str, shapes: Shapes, draw: Draw) -> Verdict:
    case = CASES[name](shapes, draw)
    by_kernel, by_reference = partial(case.run, functional), partial(case.run, reference)
    exact = _results(by_reference, [t.double() for t in case.inputs], draw.dtype)
    low = _results(case.eager or by_reference, case.inputs, draw.dtype)
    try:
        ours = _results(by_kernel, case.inputs, draw.dtype)
        if draw.device.type == "cuda":
            torch.cuda.synchronize(draw.device)
    except Exception as error:  # whatever Triton, its compiler or the driver raise
        text = str(error).strip().partition("\n")[0][:200]
        _check_device(name, text, draw.device)
        return Verdict(name, math.inf, f"it raises {type(error).__name__}: {text}")
    worst, reason = 0.0, ""
    for number, tensors in enumerate(zip(ours, low, exact, strict=True)):
        ratio, breaks = judge(*tensors, draw.dtype, case.floor)
        worst = max(worst, ratio)
        what = f"gradient {number} of it" if number else "its result"
        reason = reason or (f"{what} {breaks}" if breaks else "")
    return Verdict(name, worst, reason)


def _check_device(name: str, text: str, device: torch.device) -> None:
    """DeviceFailed unless torch still runs on the device: an address fault ends that for good."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise DeviceFailed(f"the kernel of {name} made {device} unusable: {text}") from error


def _results(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The result, and the gradients of the inputs for one gradient of the result."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = run(*leaves)
    draws = torch.Generator(out.device).manual_seed(7)
    grad = torch.randn(out.shape, generator=draws, device=out.device).to(dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def remembered(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> list[Verdict]:
    """What `verify` answers, from the user's cache if it was asked before on such a device."""
    facts = _facts(shapes, dtype, device)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = _folder() / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        values = json.loads(path.read_text("utf-8"))["verdicts"]
        return [Verdict(**each) for each in values]
    verdicts = verify(shapes, dtype, device)
    text = json.dumps({"verdicts": [dataclasses.asdict(v) for v in verdicts], "of": facts})
    with contextlib.suppress(OSError):  # a cache that can't be written costs seconds at each start
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    return verdicts


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "clue_ds" / "kernels"


def _facts(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Everything that could change the answer."""
    import triton

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": [path.read_text() for path in DRIVERS if path.is_file()],
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "triton": triton.__version__,
        "clue_ds": importlib.metadata.version("clue_ds"),
        "kernels": _hash_of_kernels(),
        "dtype": str(dtype),
        "shapes": dataclasses.asdict(shapes),
    }


@functools.cache
def _hash_of_kernels() -> str:
    """Of their source, which changes without the version while someone works on it."""
    texts = (path.read_bytes() for path in sorted(Path(backend.__file__).parent.rglob("*.py")))
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
