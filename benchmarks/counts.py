"""What a step asks of a GPU, counted without one: launches, bytes and FLOPs.

Eager code is counted on meta tensors: every operation that is not a view is one launch, which reads
its inputs and writes its results once. Dropout and attention are taken as CUDA runs them: one fused
operation each, and flash attention, whose head size must be a multiple of 8. Compiled code is
counted by step_counts.py, which needs torch's CUDA build.

`predicted_ms` turns counts into time with RATES, which are assumptions until somebody measures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from clue_ds.kernels.shared.launching import Launcher

# These only change how a tensor is looked at, or make one without writing it.
VIEWS = {
    "view", "reshape", "permute", "transpose", "slice", "select", "unbind", "expand", "squeeze",
    "unsqueeze", "t", "alias", "detach", "detach_", "as_strided", "split", "split_with_sizes",
    "_unsafe_view", "narrow", "unflatten", "is_same_size", "lift_fresh", "_reshape_alias", "empty",
    "new_empty", "empty_like", "empty_strided",
}  # fmt: skip
# Operations that make the host wait for the GPU.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal"}

# Of an H100: bytes per second of fused elementwise kernels (a copy reaches 3.0 TB/s), FLOP/s of
# matrix products by hidden size and of flash attention with dropout by (head size, length).
BYTES_PER_SECOND = 2.3e12
GEMM_RATES = {312: 420e12, 768: 600e12, 1024: 640e12}
ATTENTION_RATES = {
    (26, 128): 70e12, (26, 512): 110e12, (64, 128): 120e12, (64, 512): 180e12,
}  # fmt: skip


class Launch(NamedTuple):
    """One operation of the device: its kind is gemm, attention or other."""

    name: str
    num_bytes: int
    flops: int

    @property
    def kind(self) -> str:
        if self.name in ("mm", "addmm", "bmm", "baddbmm"):
            return "gemm"
        return "attention" if "flash_attention" in self.name else "other"


class Recorder(TorchDispatchMode):
    """Records every launch, and every operation for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet._qualified_op_name.split("::")[-1]
        if name in WAITS:
            self.waits.append(name)
        if func.namespace == "prim" or name in VIEWS:
            return out
        tensors = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, Tensor)]
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        count = flop_registry.get(packet)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.launches.append(Launch(name, num_bytes, flops))
        return out


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **more: Any,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention as CUDA runs it without a mask."""
    assert attn_mask is None, "with a mask CUDA takes no flash attention"
    size = query.shape[-1]
    padding = -size % 8
    padded = [F.pad(t, (0, padding)) if padding else t for t in (query, key, value)]
    operation = torch.ops.aten._scaled_dot_product_flash_attention
    out = operation(*padded, dropout_p, is_causal, False, scale=size**-0.5)[0]
    return out[..., :size]


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Within: dropout and attention are the operations that they are on CUDA."""
    with (
        mock.patch.object(F, "dropout", _dropout),
        mock.patch.object(F, "scaled_dot_product_attention", flash_attention),
    ):
        yield


def count_eager(loss: Callable[[], Tensor]) -> tuple[Recorder, Recorder]:
    """The forward and the backward pass of a loss whose tensors are all on the meta device."""
    with as_on_cuda():
        with Recorder() as forward:
            value = loss()
        with Recorder() as backward:
            value.backward()
    return forward, backward


def count_operation(run: Callable[[], Any]) -> list[Launch]:
    """The launches of an operation of ours on tensors without memory: its kernels and torch's."""
    launches: list[Launch] = []

    def launch(self: Any, grid: Any, tensors: tuple[Tensor | None, ...], *more: Any) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in present)
        launches.append(Launch(self.kernel.__name__, num_bytes, 0))

    with mock.patch.object(Launcher, "__call__", launch), Recorder() as recorder:
        run()
    return launches + recorder.launches


def totals(launches: list[Launch]) -> dict[str, float]:
    """Launches, GB by kind, and TFLOP of matrix products and of attention."""
    found: dict[str, float] = {"launches": len(launches)}
    for kind in ("gemm", "attention", "other"):
        num_bytes = sum(x.num_bytes for x in launches if x.kind == kind)
        found[f"{kind}_gb"] = round(num_bytes / 1e9, 4)
    found["gb"] = round(sum(x.num_bytes for x in launches) / 1e9, 4)
    for kind in ("gemm", "attention"):
        found[f"{kind}_tflop"] = round(sum(x.flops for x in launches if x.kind == kind) / 1e12, 5)
    return found


def predicted_ms(figures: dict[str, float], hidden: int, head_size: int, length: int) -> float:
    """Milliseconds on an H100 for the `totals` of a step, if only the device limits it."""
    seconds = figures["other_gb"] * 1e9 / BYTES_PER_SECOND
    seconds += figures["gemm_tflop"] * 1e12 / GEMM_RATES[hidden]
    seconds += figures["attention_tflop"] * 1e12 / ATTENTION_RATES[head_size, length]
    return 1e3 * seconds
