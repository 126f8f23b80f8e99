"""How fast each operation is compared with other providers: bytes per second, percent of a copy.

M: rows   H: hidden size, or the number of keys for masked_softmax (M x H scores); attention has M
tokens in sequences of equal length

100% is a device copy of the same number of bytes, measured right before in the same run. The bytes
are those that a fused operation must move (TRAFFIC in cases.py), whichever provider is measured, so
a provider that moves more shows a lower rate. Attention has TFLOP/s beside it. Before a provider is
timed, its result and gradients must agree with fp32 torch.

Clocks: `graph` replays a captured CUDA graph, which times the kernels alone, as in a training step
under CUDA graphs. `eager` calls from Python one after another. `host` is the time until a call on 8
rows returns, without waiting for the GPU; it has no bandwidth. Between repeats on a GPU, more
memory is written than the L2 cache holds.

Provider `ours` always takes the kernel; `auto`, for `layer_norm` only, is the package's own choice.

On a CPU, `eager` shows only that this file works, and `ours` is the reference. `host` has 0 rows
there, so it times all of a call except Triton's launch. It has `ours` only where kernels can run,
in the interpreter (TRITON_INTERPRET=1), which with 0 rows has nothing to interpret.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import functional, reference
from ..backend import available, get_backend, set_backend
from . import attention
from .cases import OPS, SEQ_LENGTH, Case, Mode, Op, Row

__all__ = ["OPS", "SEQ_LENGTH", "Case", "Mode", "Op", "Row", "check", "measure", "providers"]

EPS = 1e-12
REPEATS = {"cuda": 50, "cpu": 3}
WARMUP = 5
HOST_REPEATS = 200
HOST_ROWS = {"cuda": 8, "cpu": 0}
NUM_WORDS = 8_064  # of embedding_layer_norm
CACHE_BYTES = 256 << 20  # more than any L2 of today
# Largest difference from fp32 torch on inputs N(0, 1), as a share of the tensor's largest element.
# Torch's own chain of bf16 operations is off by up to 6%, in the sums over rows that a parameter's
# gradient is. NEARLY_ZERO stands in for the largest element where exact gradients cancel.
NEARLY_ZERO = 1e-2
TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Forward = Callable[..., Tensor]


def inputs_of(case: Case, device: torch.device, provider: str = "ours") -> list[Tensor]:
    """The leaf tensors that a provider's forward takes; activations first."""
    torch.manual_seed(0)
    if case.op == "attention":
        return attention.inputs_of(case, device, provider)
    shape = (case.rows, case.hidden)

    def leaf(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(size, device=device).to(dtype).requires_grad_()

    if case.op == "masked_softmax":
        return [leaf(1, 1, *shape)]
    if case.op == "bias_gelu":
        return [leaf(*shape), leaf(case.hidden)]
    if case.op == "layer_norm":
        return [leaf(*shape), leaf(case.hidden), leaf(case.hidden)]
    if case.op == "embedding_layer_norm":
        tables = [leaf(n, case.hidden) for n in (NUM_WORDS, case.length, 2)]
        return [*tables, leaf(case.hidden), leaf(case.hidden)]
    return [leaf(*shape), leaf(case.hidden), leaf(*shape), leaf(case.hidden), leaf(case.hidden)]


def _ids(case: Case, device: torch.device) -> Tensor:
    """int64 [sequences, length]."""
    draws = torch.Generator().manual_seed(0)
    shape = (case.rows // case.length, case.length)
    ids = torch.randint(NUM_WORDS, shape, generator=draws)
    return ids.to(device)


def _chain(implementation: Any, case: Case, device: torch.device) -> Forward:
    """The operation of `functional` or `reference` at this case's options."""
    if case.op == "attention":
        return attention.packed(implementation, case, device)
    if case.op == "layer_norm":
        return lambda x, w, b: implementation.layer_norm(x, w, b, EPS)
    if case.op == "bias_gelu":
        return lambda x, b: implementation.bias_gelu(x, b)
    if case.op == "masked_softmax":
        return lambda s: implementation.masked_softmax(s, scale=0.125, dropout_p=case.p)
    if case.op == "embedding_layer_norm":
        ids = _ids(case, device)
        return lambda *t: implementation.embedding_layer_norm(
            ids, ids % 2, *t, case.p, EPS, case.p > 0
        )
    return lambda x, b, r, w, lb: implementation.bias_dropout_add_layer_norm(
        x, b, r, w, lb, case.p, EPS, case.p > 0
    )


def providers(case: Case, device: torch.device) -> dict[str, Forward]:
    """The providers of this case here: torch, torch.compile, ours, and installed peers."""
    found = {"torch": _chain(reference, case, device), "ours": _chain(functional, case, device)}
    if case.op == "layer_norm":  # the only operation whose `auto` may leave the kernel aside
        found["auto"] = found["ours"]
    if device.type != "cuda":
        return found
    if case.op == "attention":
        return found | attention.peers(case, device)
    found["compile"] = torch.compile(_chain(reference, case, device), dynamic=False)
    with contextlib.suppress(ImportError):
        found |= _flash_attn(case)
    with contextlib.suppress(ImportError):
        found |= _liger(case)
    with contextlib.suppress(ImportError):
        found |= _apex(case)
    return found


def _import(name: str) -> Any:
    """Import a peer's module by its name: none of them is a dependency of ours."""
    import importlib

    return importlib.import_module(name)


def _flash_attn(case: Case) -> dict[str, Forward]:
    norm = _import("flash_attn.ops.triton.layer_norm").layer_norm_fn
    if case.op == "layer_norm":
        return {"flash-attn": lambda x, w, b: norm(x, w, b, eps=EPS)}
    if case.op == "bias_dropout_add_layer_norm":
        return {
            "flash-attn": lambda x, b, r, w, lb: norm(
                x + b, w, lb, residual=r, eps=EPS, dropout_p=case.p
            )
        }
    return {}


def _liger(case: Case) -> dict[str, Forward]:
    if case.op == "masked_softmax":
        softmax = _import("liger_kernel.ops.softmax").LigerSoftmaxFunction
        chain = lambda s: reference.dropout(softmax.apply(s * 0.125), case.p, True)  # noqa: E731
        return {"liger": chain}
    norm = _import("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    if case.op == "layer_norm":
        return {"liger": lambda x, w, b: norm.apply(x, w, b, EPS)}
    if case.op == "bias_dropout_add_layer_norm":
        return {
            "liger": lambda x, b, r, w, lb: norm.apply(
                r + reference.dropout(x + b, case.p, True), w, lb, EPS
            )
        }
    return {}


def _apex(case: Case) -> dict[str, Forward]:
    if case.op != "layer_norm":
        return {}
    norm = _import("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return {"apex": lambda x, w, b: norm(x, w, b, (case.hidden,), eps=EPS)}


def errors(case: Case, device: torch.device) -> dict[str, float]:
    """Each provider's largest error against fp32 torch, without dropout; see TOLERANCE."""
    quiet = case._replace(p=0.0, rows=min(case.rows, 257))
    wide = [leaf.detach().float().requires_grad_() for leaf in inputs_of(quiet, device)]

    def run(forward: Forward, tensors: list[Tensor]) -> list[Tensor]:
        out = forward(*tensors)
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out) / quiet.rows**0.5)
        if case.op == "attention" and len(grads) == 3:
            return [out, torch.stack(grads, dim=1)]
        return [out, *grads]

    expected, worst = run(_chain(reference, quiet, device), wide), {}
    for name, forward in providers(quiet, device).items():
        with _backend_of(name, device.type == "cuda"):
            found = run(forward, inputs_of(quiet, device, name))
        pairs = zip(found, expected, strict=True)
        worst[name] = max(_relative_error(mine, exact) for mine, exact in pairs)
    return worst


def _relative_error(found: Tensor, exact: Tensor) -> float:
    largest = max(exact.abs().max().item(), NEARLY_ZERO)
    return (found.float() - exact).abs().max().item() / largest


def check(case: Case, device: torch.device) -> None:
    """AssertionError for a provider that is off by more than TOLERANCE."""
    for name, error in errors(case, device).items():
        assert error <= TOLERANCE[case.dtype], f"{name} is off by {error:.1%} on {case}"


@contextlib.contextmanager
def _backend_of(provider: str, can_run: bool) -> Iterator[None]:
    """Within: the kernels if they can run, except that provider `auto` chooses for itself."""
    previous = get_backend()
    set_backend("triton" if can_run and provider != "auto" else "auto")
    yield
    set_backend(previous)


@contextlib.contextmanager
def _surroundings(device: torch.device) -> Iterator[None]:
    """Within: what CUDA graphs and torch.compile need to be measured on a GPU.

    A stream other than the default one, because autograd runs a backward pass on the stream of its
    forward pass, and the default stream can't be captured. Compiled backward passes that may run
    more than once. No compiled code of other cases, because Dynamo runs a function eagerly once it
    has compiled it eight times.
    """
    if device.type != "cuda":
        yield
        return
    from torch._functorch import config as autograd_config

    torch.compiler.reset()
    with (
        autograd_config.patch(donated_buffer=False),
        torch.cuda.stream(torch.cuda.Stream(device)),
    ):
        yield
    torch.cuda.synchronize(device)


def measure(case: Case, modes: list[Mode], device: torch.device) -> list[Row]:
    """The figures of all providers, modes and clocks of one case, after `check`."""
    rows = []
    with _surroundings(device):
        check(case, device)
        for mode in modes:
            num_bytes = case.num_bytes(mode)
            for clock in ("graph", "eager") if device.type == "cuda" else ("eager",):
                copy = statistics.median(_times(_copy(num_bytes, device), clock, device))
                for name, forward in providers(case, device).items():
                    with _backend_of(name, device.type == "cuda"):
                        job = _job(forward, inputs_of(case, device, name), mode)
                        times = sorted(_times(job, clock, device))
                    rows.append(_row(case, mode, clock, name, times, copy))
            rows += _host_rows(case, mode, device)
    return rows


def measure_ours(case: Case, mode: Mode, device: torch.device) -> Row:
    """The figure of our kernel alone, unchecked; on a GPU from a CUDA graph."""
    clock = "graph" if device.type == "cuda" else "eager"
    with _surroundings(device), _backend_of("ours", device.type == "cuda"):
        copy = statistics.median(_times(_copy(case.num_bytes(mode), device), clock, device))
        job = _job(_chain(functional, case, device), inputs_of(case, device), mode)
        times = sorted(_times(job, clock, device))
    return _row(case, mode, clock, "ours", times, copy)


def _host_rows(case: Case, mode: Mode, device: torch.device) -> list[Row]:
    """The time that a call keeps Python busy; it has no bandwidth."""
    small = case._replace(rows=HOST_ROWS[device.type])
    found = []
    for name, forward in providers(small, device).items():
        if name == "ours" and not available():
            continue
        with _backend_of(name, available()):
            job, times = _job(forward, inputs_of(small, device, name), mode), []
            for i in range(WARMUP + HOST_REPEATS):
                if i % 8 == 0 and device.type == "cuda":
                    torch.cuda.synchronize(device)  # calls wait while the launch queue is full
                start = time.perf_counter()
                job()
                times.append(1e6 * (time.perf_counter() - start))
        times = sorted(times[WARMUP:])
        found.append(_row(small, mode, "host", name, times, float("nan")))
    return found


def _row(case: Case, mode: Mode, clock: str, provider: str, times: list[float], copy: float) -> Row:
    """`times` and `copy` are in microseconds, `times` ascending."""
    median = statistics.median(times)
    low, high = (times[round(q * (len(times) - 1))] for q in (0.2, 0.8))
    dtype = str(case.dtype).removeprefix("torch.")
    key = (case.op, case.rows, case.hidden, dtype, case.p, mode, clock, provider)
    gb_per_s = case.num_bytes(mode) / median / 1e3 if clock != "host" else float("nan")
    tflop_per_s = case.num_flops(mode) / median / 1e6
    rates = (gb_per_s, 100 * copy / median)
    return Row(*key, median, low, high, *rates, case.seq_length, tflop_per_s)


def _copy(num_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that reads half of the bytes and writes the other half."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _job(forward: Forward, leaves: list[Tensor], mode: Mode) -> Callable[[], object]:
    """The function that is timed; that of `bwd` runs backward on the same graph every time."""
    if mode == "fwd":
        return lambda: forward(*leaves)
    if mode == "full":
        return lambda: _differentiate(forward(*leaves), leaves)
    out = forward(*leaves)
    dy = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, dy, retain_graph=True)


def _differentiate(out: Tensor, leaves: list[Tensor]) -> object:
    return torch.autograd.grad(out, leaves, out.detach())


def _times(job: Callable[[], object], clock: str, device: torch.device) -> list[float]:
    """The microseconds of each repeat."""
    for _ in range(WARMUP if device.type == "cuda" else 1):
        job()
    if device.type != "cuda":
        times = []
        for _ in range(REPEATS["cpu"]):
            start = time.perf_counter()
            job()
            times.append(1e6 * (time.perf_counter() - start))
        return times
    if clock == "graph":
        job = _captured(job)
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS["cuda"])] for _ in range(2)
    ]
    for start_event, end_event in zip(*events, strict=True):
        cache.zero_()
        start_event.record()
        job()
        end_event.record()
    torch.cuda.synchronize(device)
    return [1e3 * start.elapsed_time(end) for start, end in zip(*events, strict=True)]


def _captured(job: Callable[[], object]) -> Callable[[], object]:
    """A function that replays `job` as a CUDA graph of the current stream.

    `job` must have run before, so that nothing is compiled while it is captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        job()
    return graph.replay
