"""Training throughput without padding against the same rows with it, in real tokens per second.

Both sides are our encoder with the same weights, optimizer, precision and dropout, and train on the
same rows of the same corpus, one document each. They run in one process and take turns after every
step, in alternating order. Before the timing, both must compute the same loss with dropout off.
Batches are made before the timing: in training they come from the loader's thread.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from clue_ds import presets
from clue_ds.benchmarks.description import write_results
from clue_ds.benchmarks.pretrain import Setting, make_ours, spread
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.flat import ON_HOST, FlatStream, split
from clue_ds.data.sampling import RowKind
from clue_ds.model.masks import without_full_lengths

Batch = dict[str, Tensor]
WARMUP_STEPS = 2
# Relative difference of the losses: another order of fp32 sums, or 8 bits of every activation.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


class Side:
    """A network that trains on micro-batches of one form, one timed step at a time."""

    def __init__(self, network: nn.Module, batches: list[Batch], setting: Setting) -> None:
        self.network, self.setting = network, setting
        self.batches = [
            {n: t if n in ON_HOST[1:] else t.to(setting.device) for n, t in batch.items()}
            for batch in batches
        ]
        fused = True if setting.device.type == "cuda" else None
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=fused)

    def loss(self, number: int) -> Tensor:
        with self.setting.autocast():
            return self.network(**self.batches[number % len(self.batches)]).loss

    def step(self, number: int) -> float:
        """Train on a micro-batch; returns seconds."""
        self._wait()
        began = time.perf_counter()
        self.loss(number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - began

    def loss_without_dropout(self) -> float:
        self.network.eval()
        with torch.no_grad():
            loss = float(self.loss(0))
        self.network.train()
        return loss

    def _wait(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()


def make_batches(
    corpus: Corpus, samples: RowKind, seq_length: int, size: int, number: int, seed: int
) -> tuple[list[Batch], list[Batch]]:
    """`number` micro-batches of the same rows, padded and flat."""
    on_gpu = torch.cuda.is_available()
    sizes = (seq_length, size, seed)
    flat = FlatStream(corpus, *sizes, samples=samples, micro_batch_size=size, is_static=on_gpu)
    padded = SampleStream(corpus, *sizes, samples=samples)
    steps = range(number)
    return (
        [without_full_lengths(padded.batch(step)) for step in steps],
        [split(flat.batch(step))[0] for step in steps],
    )


def padding(
    corpus: Path,
    samples: RowKind = "documents",
    preset: str = "roberta_tiny_clue",
    seq_length: int = 512,
    micro_batch_size: int = 32,
    steps: int = 20,
    precision: Literal["fp32", "bf16"] | None = None,
    threads: int | None = None,
    seed: int = 42,
    output: Path | None = None,
) -> None:
    """Measure training in real tokens/s without padding against padded rows, in turns.

    Args:
        corpus: directory written by `clue-ds shard`.
        samples: what a row holds.
        preset: the model, with dropout 0.1.
        seq_length: tokens per padded row.
        micro_batch_size: rows per step.
        steps: timed steps of each side.
        precision: fp32, or bf16 autocast; default fp32 on a CPU, bf16 on CUDA.
        threads: number of torch's threads on a CPU; default torch's own.
        seed: seed of weights, rows and dropout.
        output: JSON file for the result.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    opened = Corpus(corpus)
    config = presets.get(preset).replace(vocab_size=opened.vocab_size)
    type_name = precision or ("bf16" if device.type == "cuda" else "fp32")
    setting = Setting(config, device, type_name, compile=False)
    batches = make_batches(opened, samples, seq_length, micro_batch_size, steps, seed)
    padded, flat = (Side(make_ours(setting, seed).network, part, setting) for part in batches)
    losses = padded.loss_without_dropout(), flat.loss_without_dropout()
    if abs(losses[0] - losses[1]) > LOSS_TOLERANCE[type_name] * losses[0]:
        raise RuntimeError(f"the two sides compute different losses: {losses[0]} and {losses[1]}")
    seconds = measure((padded, flat), steps)
    full = torch.full((micro_batch_size,), seq_length)
    tokens = np.array([int(b.get("lengths", full).sum()) for b in batches[0]])
    result = {
        "benchmark": "padding",
        "setting": {
            "preset": preset,
            "samples": samples,
            "seq_length": seq_length,
            "micro_batch_size": micro_batch_size,
            "precision": type_name,
            "dropout": config.hidden_dropout_prob,
            "steps": steps,
            "seed": seed,
        },
        "real_tokens": float(tokens.mean() / (micro_batch_size * seq_length)),
        "loss_with_dropout_off": {"padded": losses[0], "flat": losses[1]},
        "padded": {"tokens_per_second": spread(tokens / seconds[0])},
        "flat": {"tokens_per_second": spread(tokens / seconds[1])},
        "ratio": spread(seconds[0] / seconds[1]),
    }
    show(result)
    if output is not None:
        write_results(output, result)


def measure(sides: tuple[Side, Side], steps: int) -> np.ndarray:
    """Seconds [2, steps] of both sides, which alternate; both take the same rows in a step."""
    for side in sides:
        for step in range(WARMUP_STEPS):
            side.step(step)
    seconds = np.empty((2, steps))
    for step in range(steps):
        for number in (0, 1) if step % 2 == 0 else (1, 0):
            seconds[number, step] = sides[number].step(step)
    return seconds


def show(result: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{result['real_tokens']:.0%} of the padded rows are tokens")
    for name in ("padded", "flat"):
        rate = result[name]["tokens_per_second"]
        console.print(
            f"{name:<8} {rate['median']:>12,.0f} real tokens/s "
            f"({rate['p20']:,.0f} to {rate['p80']:,.0f})"
        )
    ratio = result["ratio"]
    console.print(f"ratio {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
