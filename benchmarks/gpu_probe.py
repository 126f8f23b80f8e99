"""Two stages of `clue-ds bench gpu`: what this device, this torch and this host can do, and whether
our kernels compute the right numbers here.

`device` measures what decides about the training step: what a call costs the host, copies, matrix
products, attention by backend, and the rate at which each backend's dropout really drops. `kernels`
compares each kernel with torch as a run does before it uses them. Every probe stands alone: one
that fails leaves its message in its place.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clue_ds import files, kernels, presets
from clue_ds.kernels import verify
from clue_ds.model import ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16 = torch.bfloat16
BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def _sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def median_us(job: Callable[[], Any], repeats: int = 10, warmup: int = 3) -> float:
    """Median time of a call on the device, in microseconds."""
    for _ in range(warmup):
        job()
    _sync()
    times = []
    for _ in range(repeats):
        if CUDA:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            job()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            job()
            times.append(1e6 * (time.perf_counter() - began))
    return round(sorted(times)[len(times) // 2], 2)


def host_us(small: bool) -> dict[str, float]:
    """Microseconds that a call keeps the host busy."""
    x = torch.zeros(8, device=DEVICE)
    w = torch.zeros(8, device=DEVICE, requires_grad=True)

    def per_call(job: Callable[[], Any], number: int) -> float:
        job()
        _sync()
        began = time.perf_counter()
        for _ in range(number):
            job()
        us = 1e6 * (time.perf_counter() - began) / number
        _sync()
        return round(us, 2)

    found = {
        "add_": per_call(lambda: x.add_(1.0), 2_000),
        "mul with autograd": per_call(lambda: w * 2.0, 2_000),
        "item": per_call(lambda: x[0].item(), 500),
        "synchronize": per_call(_sync, 500),
    }
    if CUDA:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(200):
                x.add_(1.0)
        found["replay of a graph of 200 add_"] = per_call(graph.replay, 200)
        found["the same, time on the device"] = median_us(graph.replay)
    return found


def copy_tb_per_s(small: bool) -> dict[str, float]:
    """Bytes read and written by a copy, at sizes that a step has."""
    found = {}
    for megabytes in (4,) if small else (32, 128, 512, 2048):
        source = torch.empty(megabytes << 20, dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        us = median_us(lambda source=source, target=target: target.copy_(source))  # type: ignore[misc]
        found[f"{megabytes} MiB"] = round(2 * source.numel() / us / 1e6, 3)
    return found


def gemm_tflop_per_s(small: bool) -> dict[str, dict[str, float]]:
    """Rates of the matrix products of a block, forward and both of its backward passes."""
    tokens = 256 if small else 65_536
    found: dict[str, dict[str, float]] = {}
    for hidden in (32,) if small else (312, 768, 1024):
        for name, (into, out) in {
            "qkv": (1, 3),
            "proj": (1, 1),
            "up": (1, 4),
            "down": (4, 1),
        }.items():
            x = torch.randn(tokens, into * hidden, device=DEVICE, dtype=BF16)
            weight = torch.randn(out * hidden, into * hidden, device=DEVICE, dtype=BF16)
            bias = torch.zeros(out * hidden, device=DEVICE, dtype=BF16)
            dy = torch.randn(tokens, out * hidden, device=DEVICE, dtype=BF16)
            jobs: dict[str, Callable[[], Any]] = {
                "forward": lambda x=x, w=weight, b=bias: F.linear(x, w, b),  # type: ignore[misc]
                "to input": lambda dy=dy, w=weight: dy @ w,  # type: ignore[misc]
                "to weight": lambda dy=dy, x=x: dy.t() @ x,  # type: ignore[misc]
            }
            flops = 2 * tokens * into * out * hidden**2
            rates = {kind: round(flops / median_us(job) / 1e6, 1) for kind, job in jobs.items()}
            found[f"{hidden} {name}"] = rates
    return found


def attention_us(small: bool) -> dict[str, dict[str, Any]]:
    """[forward, forward and backward] by backend, for head sizes, lengths and dropout rates."""
    tokens = 128 if small else 65_536
    found: dict[str, dict[str, Any]] = {}
    for heads, size in ((12, 26), (12, 32), (12, 64)):
        for length in (16,) if small else (128, 512):
            shape = (tokens // length, length, 3, heads, size)
            qkv = torch.randn(shape, device=DEVICE, dtype=BF16, requires_grad=True)
            for p in (0.0, 0.1):
                rows = found[f"head size {size}, length {length}, dropout {p}"] = {}
                for backend in BACKENDS:
                    rows[backend.name] = _attention(backend, qkv, p)
    return found


def _attention(backend: SDPBackend, qkv: torch.Tensor, p: float) -> list[float] | str:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p)

    try:
        with sdpa_kernel([backend]):
            dy = torch.randn_like(forward())
            both = median_us(lambda: torch.autograd.grad(forward(), qkv, dy))
            return [median_us(forward), both]
    except RuntimeError as error:
        return str(error).splitlines()[0][:90]


def dropout_rates(small: bool) -> dict[str, Any]:
    """The share that each backend drops, and its scale: with v = identity, the result is a mask."""
    size = 64
    query = torch.zeros(64, 12, size, size, device=DEVICE, dtype=BF16)
    value = torch.eye(size, device=DEVICE, dtype=BF16).expand(64, 12, size, size).contiguous()
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        for p in (0.1, 0.125):
            try:
                with sdpa_kernel([backend]):
                    out = F.scaled_dot_product_attention(query, query, value, dropout_p=p).float()
                kept = out[out != 0]
                found[f"{backend.name}, {p}"] = {
                    "dropped": round((out == 0).float().mean().item(), 5),
                    "scale": round(kept.median().item() * size, 4),
                    "right scale": round(1 / (1 - p), 4),
                }
            except RuntimeError as error:
                found[f"{backend.name}, {p}"] = str(error).splitlines()[0][:90]
    return found


def kernel_errors(small: bool) -> Iterator[dict[str, Any]]:
    """Each kernel against torch at tiny's and base's sizes, by the rule that `auto` goes by."""
    if not kernels.available():
        return
    names = ("roberta_tiny_clue",) if small else ("roberta_tiny_clue", "bert_base_clue")
    for name in names:
        config = presets.get(name)
        if small:
            config = config.replace(hidden_size=24, intermediate_size=40, vocab_size=30)
        sizes = ops.sizes(config, 2 if small else 64, 16 if small else 128)
        for dtype in (torch.float32,) if small else (BF16, torch.float32):
            for verdict in verify.verify(sizes, dtype, DEVICE):
                yield {
                    "op": verdict.operation, "width": config.hidden_size, "dtype": str(dtype)[6:],
                    "agrees": verdict.agrees, "error": verdict.error, "reason": verdict.reason,
                }  # fmt: skip


PROBES: dict[str, tuple[Callable[[bool], Any], ...]] = {
    "device": (host_us, copy_tb_per_s, dropout_rates, attention_us, gemm_tflop_per_s),
    "kernels": (kernel_errors,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=PROBES)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for probe in PROBES[options.which]:
        try:
            figures = probe(options.small)
            if isinstance(figures, Iterator):  # a stage that is cut short leaves those so far
                lines = found[probe.__name__] = []
                for line in figures:
                    lines.append(line)
                    files.write_json(options.output, found)
                    print(line, flush=True)
            else:
                found[probe.__name__] = figures
                print(probe.__name__, figures, flush=True)
        except Exception:
            found[probe.__name__] = traceback.format_exc()[-600:]
            traceback.print_exc()
        files.write_json(options.output, found)


if __name__ == "__main__":
    main()
