"""Training throughput of our encoder against transformers' BertForMaskedLM in a plain loop.

Both sides see the same rows and predict the same tokens with the same optimizer, precision and
dropout. They run in one process and take turns after every step, in alternating order, so that a
machine that slows down slows both. Before the timing, both must compute the same loss from the same
weights with dropout off. On CUDA each side gets bf16 autocast, torch.compile, fused AdamW, SDPA and
as many rows per step as fit. Where every row is full, the peer runs without an attention mask and,
as one more contender, with it; the ratio is against the one without.

Rejected: two processes one after the other (the load of a shared machine varies by more than the
difference that is measured); giving the peer our MLM head, which computes masked positions only
(transformers has none, and that is part of the comparison); trying several micro-batch sizes, each
of which torch.compile would compile anew (a larger one was never slower).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import nn

from clue_ds import presets
from clue_ds.benchmarks.description import write_results
from clue_ds.benchmarks.flops import executed_flops, gemm_rate
from clue_ds.benchmarks.sides import (
    IGNORED_LABEL,
    Batch,
    Setting,
    Side,
    check_same_loss,
    corpus_rows,
    for_both,
    make_ours,
    make_peer,
    random_rows,
    without_mask,
)
from clue_ds.data import Corpus
from clue_ds.metrics import flops_per_token, peak_flops
from clue_ds.model import BertForPreTraining
from clue_ds.model.encoder import without_full_lengths

WARMUP_STEPS = 3
CPU_MICRO_BATCH_SIZE = 32
MOST_TOKENS = 131_072  # in a step on CUDA, where it no longer gets faster with more
FILLED = 0.85  # of the free memory; compiled code needs less than the eager step that is measured


def make_optimizer(network: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    fused = True if setting.device.type == "cuda" else None
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-4, fused=fused)


def timed_step(
    side: Side, batch: Batch, optimizer: torch.optim.Optimizer, setting: Setting
) -> float:
    """Train on a batch; returns seconds."""

    def wait() -> None:
        if setting.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    with setting.autocast():
        loss = side.loss(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    wait()
    return time.perf_counter() - began


class Trainer:
    """A plain training loop over slices of the rows, one timed step at a time."""

    def __init__(self, side: Side, setting: Setting, rows: Batch) -> None:
        self.side, self.setting, self.rows = side, setting, rows
        self.num_rows = len(rows["input_ids"])
        self.cursor = 0
        self.optimizer = make_optimizer(side.network, setting)

    def step(self, size: int) -> float:
        """Train on the next `size` rows; returns seconds."""
        if self.cursor + size > self.num_rows:
            self.cursor = 0
        span = slice(self.cursor, self.cursor + size)
        # The engine does the same.
        batch = without_full_lengths({name: tensor[span] for name, tensor in self.rows.items()})
        self.cursor += size
        return timed_step(self.side, batch, self.optimizer, self.setting)

    def stepper(self, size: int) -> Callable[[int], float]:
        """`step` on `size` rows, for `measure`."""
        return lambda _: self.step(size)

    def flops_per_row(self, num_rows: int = 8) -> float:
        """Executed FLOPs of a row in an eager step; the network must not be compiled yet."""
        batch = without_full_lengths({k: v[:num_rows] for k, v in self.rows.items()})
        with self.setting.autocast():
            total = executed_flops(lambda: self.side.loss(batch))
        self.optimizer.zero_grad(set_to_none=True)
        return total / len(batch["input_ids"])

    def fitting_size(self) -> int:
        """The largest power of two of rows that fits into the GPU, up to MOST_TOKENS tokens.

        Memory grows with the number of rows in a straight line, which two small eager steps show.
        """
        peaks = []
        for size in (8, 16):
            torch.cuda.empty_cache()
            self.step(size)  # the first one makes the optimizer's state
            torch.cuda.reset_peak_memory_stats()
            self.step(size)
            peaks.append(torch.cuda.max_memory_allocated())
        per_row = max(1.0, (peaks[1] - peaks[0]) / 8)
        torch.cuda.empty_cache()
        fixed = peaks[0] - 8 * per_row - torch.cuda.memory_allocated()
        room = FILLED * torch.cuda.mem_get_info()[0] - fixed
        most = min(room / per_row, MOST_TOKENS / self.rows["input_ids"].shape[1])
        return 1 << max(0, int(most).bit_length() - 1)


def compile_sides(ours: Side, peer: Side) -> None:
    """torch.compile both as their users would: our parts, and the peer's whole network."""
    assert isinstance(ours.network, BertForPreTraining)
    ours.network.compile_blocks()
    peer.network.compile(dynamic=False)


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def measure(
    sides: Sequence[Callable[[int], float]], steps: int, warmup_steps: int = WARMUP_STEPS
) -> np.ndarray:
    """Seconds [sides, steps] of all, which take turns; a side makes the step of a number."""
    for side in sides:
        for step in range(warmup_steps):
            side(step)
    order = list(range(len(sides)))
    seconds = np.empty((len(sides), steps))
    for step in range(steps):
        for number in order if step % 2 == 0 else reversed(order):
            seconds[number, step] = sides[number](step)
    return seconds


def report(
    trainer: Trainer, size: int, seconds: np.ndarray, flops_per_row: float, gemm: float
) -> dict[str, Any]:
    """The figures of one side; `gemm` is the rate of the fastest matrix product."""
    setting = trainer.setting
    lengths = trainer.rows["lengths"].double()
    tokens = float(lengths.mean()) * size
    s_eff = float(lengths.square().sum() / lengths.sum())
    rates = tokens / seconds
    peak = peak_flops(setting.device)
    num_predicted = float((trainer.rows["masked_labels"] != IGNORED_LABEL).sum())
    flops = flops_per_token(setting.config, s_eff, num_predicted / float(lengths.sum()))
    executed = flops_per_row * size / float(np.median(seconds))
    return {
        "name": trainer.side.name,
        "micro_batch_size": size,
        "tokens_per_second": spread(rates),
        "milliseconds_per_step": spread(1000 * seconds),
        "mfu": None if peak is None else float(np.median(rates)) * flops / peak,
        # Hardware FLOPs utilization: what was executed, of the same peak.
        "hfu": None if peak is None else executed / peak,
        "executed_flops_per_second": executed,
        "share_of_gemm_rate": executed / gemm,
    }


def pretrain(
    preset: str = "roberta_tiny_clue",
    seq_length: int = 128,
    micro_batch_size: int | None = None,
    steps: int = 30,
    precision: Literal["fp32", "bf16"] | None = None,
    threads: int | None = None,
    compile: Literal["auto", "yes", "no"] = "auto",
    corpus: Path | None = None,
    seed: int = 42,
    output: Path | None = None,
) -> None:
    """Measure training tokens/s against transformers' BertForMaskedLM, alternating in one process.

    Args:
        preset: the model, with dropout 0.1.
        seq_length: tokens per sequence.
        micro_batch_size: sequences per step; default 32 on a CPU, on CUDA as many as fit, up to
            131,072 tokens.
        steps: timed steps of each side.
        precision: fp32, or bf16 autocast; default fp32 on a CPU, bf16 on CUDA.
        threads: number of torch's threads on a CPU; default torch's own.
        compile: torch.compile both sides; auto compiles on CUDA only.
        corpus: take rows and the size of the vocabulary from this corpus; default random tokens.
        seed: seed of weights, rows and dropout.
        output: JSON file for the result.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if threads is not None:
        torch.set_num_threads(threads)
    config = presets.get(preset)
    if corpus is not None:
        config = config.replace(vocab_size=Corpus(corpus).vocab_size)
    use_compile = on_gpu if compile == "auto" else compile == "yes"
    setting = Setting(config, device, precision or ("bf16" if on_gpu else "fp32"), use_compile)
    size = micro_batch_size if on_gpu else micro_batch_size or CPU_MICRO_BATCH_SIZE
    make_rows = partial(random_rows, config) if corpus is None else partial(corpus_rows, corpus)
    num_rows = 2 * (size or max(16, MOST_TOKENS // seq_length))
    rows = for_both(make_rows(num_rows, seq_length, seed), device)
    result = {
        "benchmark": "pretrain",
        "setting": {
            "preset": preset,
            "seq_length": seq_length,
            "vocab_size": config.vocab_size,
            "precision": setting.precision,
            "compile": setting.compile,
            "optimizer": "torch AdamW, fused" if on_gpu else "torch AdamW",
            "dropout": config.hidden_dropout_prob,
            "rows": "random tokens" if corpus is None else "corpus",
            "steps": steps,
            "seed": seed,
        },
        **compare(setting, rows, size, steps, seed),
    }
    show(result)
    if output is not None:
        write_results(output, result)


def compare(
    setting: Setting, rows: Batch, size: int | None, steps: int, seed: int
) -> dict[str, Any]:
    """The figures of all sides, and our ratio to the peer; without `size` each takes what fits."""
    ours = make_ours(setting, seed)
    peer = make_peer(setting, ours.network)
    few = {name: tensor[:8] for name, tensor in rows.items()}
    losses = check_same_loss(ours, peer, few, setting)
    sides = [ours, peer]
    if bool((rows["lengths"] == rows["input_ids"].shape[1]).all()):
        sides = [ours, without_mask(peer), peer._replace(name=f"{peer.name}, mask of ones")]
    trainers = [Trainer(side, setting, rows) for side in sides]
    flops = [trainer.flops_per_row() for trainer in trainers]
    sizes = [trainer.fitting_size() if size is None else size for trainer in trainers]
    if setting.compile:
        compile_sides(ours, peer)
    pairs = zip(trainers, sizes, strict=True)
    seconds = measure([trainer.stepper(size) for trainer, size in pairs], steps)
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    gemm = gemm_rate(setting.device, dtype)
    figures = [
        report(*values, gemm) for values in zip(trainers, sizes, seconds, flops, strict=True)
    ]
    rates = [size / time for size, time in zip(sizes, seconds, strict=True)]
    return {
        "loss_with_dropout_off": {"ours": losses[0], "peer": losses[1]},
        "gemm_flops_per_second": gemm,
        "ours": figures[0],
        "peer": figures[1],
        "peer_with_mask": figures[2] if len(figures) > 2 else None,
        "ratio": spread(rates[0] / rates[1]),
        "ratio_to_peer_with_mask": spread(rates[0] / rates[2]) if len(rates) > 2 else None,
    }


def show(result: dict[str, Any]) -> None:
    console = Console(width=160)
    for side in (result["ours"], result["peer"], result["peer_with_mask"]):
        if side is None:
            continue
        rate = side["tokens_per_second"]
        used = f"{100 * side['share_of_gemm_rate']:.0f}% of GEMM rate"
        if side["mfu"] is not None:
            used = f"MFU {100 * side['mfu']:.1f}%, executed {100 * side['hfu']:.1f}%, {used}"
        console.print(
            f"{side['name']:<42} {rate['median']:>12,.0f} tokens/s "
            f"({rate['p20']:,.0f} to {rate['p80']:,.0f}; batch {side['micro_batch_size']}, {used})"
        )
    for name, key in (("ratio", "ratio"), ("with the mask", "ratio_to_peer_with_mask")):
        if (ratio := result[key]) is not None:
            console.print(
                f"{name} {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
            )
    console.print(f"fastest matrix product: {result['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s")
