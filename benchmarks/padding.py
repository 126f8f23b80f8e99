"""Training throughput without padding against the same rows with it, in real tokens per second.

Both sides are our encoder with the same weights, optimizer, precision and dropout, and train on the
same rows of the same corpus, one document each. They run in one process and take turns after every
step, in alternating order. Before the timing, both must compute the same loss with dropout off.
Batches are made before the timing: in training they come from the loader's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import nn

from clue_ds import presets
from clue_ds.benchmarks.description import write_results
from clue_ds.benchmarks.pretrain import make_optimizer, measure, spread, timed_step
from clue_ds.benchmarks.sides import LOSS_TOLERANCE, Batch, Setting, Side, make_ours
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.flat import ON_HOST, FlatStream, split
from clue_ds.data.sampling import RowKind
from clue_ds.model.encoder import without_full_lengths
from clue_ds.pretrain.batches import needs_few_shapes

WARMUP_STEPS = 2


class Trainer:
    """Our network, which trains on micro-batches of one form, one timed step at a time."""

    def __init__(self, network: nn.Module, batches: list[Batch], setting: Setting) -> None:
        self.side = Side("clue_ds", network, lambda batch: network(**batch).loss)
        self.setting = setting
        self.batches = [
            {n: t if n in ON_HOST[1:] else t.to(setting.device) for n, t in batch.items()}
            for batch in batches
        ]
        self.optimizer = make_optimizer(network, setting)

    def step(self, number: int) -> float:
        """Train on a micro-batch; returns seconds."""
        batch = self.batches[number % len(self.batches)]
        return timed_step(self.side, batch, self.optimizer, self.setting)

    def loss_without_dropout(self) -> float:
        self.side.network.eval()
        with torch.no_grad(), self.setting.autocast():
            loss = float(self.side.loss(self.batches[0]))
        self.side.network.train()
        return loss


def make_batches(
    corpus: Corpus,
    samples: RowKind,
    seq_length: int,
    size: int,
    number: int,
    seed: int,
    is_static: bool,
) -> tuple[list[Batch], list[Batch]]:
    """`number` micro-batches of the same rows, padded and flat. `is_static`: see FlatStream."""
    sizes = (seq_length, size, seed)
    flat = FlatStream(corpus, *sizes, samples=samples, micro_batch_size=size, is_static=is_static)
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
    is_static = needs_few_shapes(device.type, type_name)
    batches = make_batches(opened, samples, seq_length, micro_batch_size, steps, seed, is_static)
    padded, flat = (Trainer(make_ours(setting, seed).network, part, setting) for part in batches)
    losses = padded.loss_without_dropout(), flat.loss_without_dropout()
    if abs(losses[0] - losses[1]) > LOSS_TOLERANCE[type_name] * losses[0]:
        raise RuntimeError(f"the two sides compute different losses: {losses[0]} and {losses[1]}")
    seconds = measure([padded.step, flat.step], steps, WARMUP_STEPS)
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
