"""Training throughput of our encoder against transformers' BertForMaskedLM in a plain loop.

Both sides see the same rows and predict the same tokens with the same optimizer, precision and
dropout. They run in one process and take turns after every step, in alternating order, so that a
machine that slows down slows both. Before the timing, both must compute the same loss from the same
weights with dropout off. On CUDA each side gets bf16 autocast, torch.compile, fused AdamW, SDPA and
the micro-batch size that is fastest for it.

Rejected: two processes one after the other (the load of a shared machine varies by more than the
difference that is measured), and giving the peer our MLM head, which computes masked positions
only (transformers has none, and that is part of the comparison).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor, nn

from clue_ds import presets
from clue_ds.benchmarks.description import write_results
from clue_ds.data import Corpus, SampleStream
from clue_ds.data.sampling import IGNORED_LABEL, num_predictions
from clue_ds.metrics import flops_per_token, peak_flops
from clue_ds.model import BertForPreTraining
from clue_ds.model.bert import pad_vocab, without_full_lengths
from clue_ds.model.weights import trim_vocab
from clue_ds.presets import ModelConfig

MASK_PROB = 0.15
FIRST_REAL_ID = 104  # below are the special tokens of Google's and CLUE's vocabularies
WARMUP_STEPS = 3
SEARCH_STEPS = 5
SEARCHED_SIZES = tuple(2**n for n in range(5, 12))  # 32 to 2,048 sequences
CPU_MICRO_BATCH_SIZE = 32
# Relative difference of losses from equal weights: fp32 sums are in another order, and bf16 keeps 8
# bits of every activation.
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    config: ModelConfig
    device: torch.device
    precision: str
    compile: bool

    def autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


class Side(NamedTuple):
    """One side of the comparison: its network and how it computes the loss of a batch."""

    name: str
    network: nn.Module
    loss: Callable[[Batch], Tensor]


def make_ours(setting: Setting, seed: int) -> Side:
    torch.manual_seed(seed)
    rows = pad_vocab(setting.config).vocab_size
    network = BertForPreTraining(setting.config, padded_vocab_size=rows).to(setting.device)

    def loss(batch: Batch) -> Tensor:
        return network(
            batch["input_ids"],
            lengths=batch.get("lengths"),
            masked_positions=batch["masked_positions"],
            masked_labels=batch["masked_labels"],
        ).loss

    return Side("clue_ds", network, loss)


def make_peer(setting: Setting, ours: nn.Module) -> Side:
    """transformers' BertForMaskedLM with our weights."""
    config = setting.config
    values: dict[str, Any] = dataclasses.asdict(config) | {"attn_implementation": "sdpa"}
    network: nn.Module = transformers.BertForMaskedLM(transformers.BertConfig(**values))
    network.to(setting.device)
    state = trim_vocab(ours.state_dict(), config.vocab_size)
    network.load_state_dict({name: state[name] for name in network.state_dict()})

    def loss(batch: Batch) -> Tensor:
        return network(
            batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss

    return Side("transformers BertForMaskedLM", network, loss)


def random_rows(config: ModelConfig, num_rows: int, seq_length: int, seed: int) -> Batch:
    """Full rows of random tokens, of which a fixed number is to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, seq_length)
    input_ids = torch.randint(FIRST_REAL_ID, config.vocab_size, shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(1)
    positions = order[:, : num_predictions(seq_length, MASK_PROB)].sort(1).values
    return {
        "input_ids": input_ids,
        "lengths": torch.full((num_rows,), seq_length),
        "masked_positions": positions,
        "masked_labels": input_ids.gather(1, positions),
    }


def corpus_rows(corpus: Path, num_rows: int, seq_length: int, seed: int) -> Batch:
    """The first samples of a corpus, as training would see them."""
    return SampleStream(Corpus(corpus), seq_length, num_rows, seed).batch(0)


def for_both(rows: Batch, device: torch.device) -> Batch:
    """Add what the peer reads: labels for all positions and an attention mask."""
    labels = torch.full_like(rows["input_ids"], IGNORED_LABEL)
    used = rows["masked_labels"] != IGNORED_LABEL
    row_index = torch.arange(len(labels))[:, None].expand_as(used)
    labels[row_index[used], rows["masked_positions"][used]] = rows["masked_labels"][used]
    seq_length = labels.shape[1]
    mask = (torch.arange(seq_length) < rows["lengths"][:, None]).long()
    batch = {**rows, "labels": labels, "attention_mask": mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def check_same_loss(ours: Side, peer: Side, batch: Batch, setting: Setting) -> tuple[float, float]:
    """Both losses with dropout off; RuntimeError if they differ, as timing is then pointless."""
    losses = []
    for side in (ours, peer):
        side.network.eval()
        with torch.no_grad(), setting.autocast():
            losses.append(side.loss(batch).float().item())
        side.network.train()
    num_slots = batch["masked_labels"].numel()
    num_used = int((batch["masked_labels"] != IGNORED_LABEL).sum())
    # Our loss is divided by the number of all slots, the peer's by the number of used ones.
    mine, theirs = losses[0] * num_slots / num_used, losses[1]
    if abs(mine - theirs) > LOSS_TOLERANCE[setting.precision] * theirs:
        raise RuntimeError(f"the two sides compute different losses: {mine} and {theirs}")
    return mine, theirs


class Trainer:
    """A plain training loop over slices of the rows, one timed step at a time."""

    def __init__(self, side: Side, setting: Setting, rows: Batch) -> None:
        self.side, self.setting, self.rows = side, setting, rows
        self.num_rows = len(rows["input_ids"])
        self.cursor = 0
        fused = setting.device.type == "cuda"
        parameters = [p for p in side.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True if fused else None)

    def step(self, size: int) -> float:
        """Train on the next `size` rows; returns seconds."""
        if self.cursor + size > self.num_rows:
            self.cursor = 0
        span = slice(self.cursor, self.cursor + size)
        # The engine does the same.
        batch = without_full_lengths({name: tensor[span] for name, tensor in self.rows.items()})
        self.cursor += size
        self._wait()
        began = time.perf_counter()
        with self.setting.autocast():
            loss = self.side.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()

    def best_size(self, sizes: tuple[int, ...]) -> int:
        """The size with the most rows per second; the search ends at the first that doesn't fit."""
        rates: dict[int, float] = {}
        for size in sizes:
            try:
                times = [self.step(size) for _ in range(WARMUP_STEPS + SEARCH_STEPS)]
            except torch.OutOfMemoryError:
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                break
            rates[size] = size / float(np.median(times[WARMUP_STEPS:]))
        return max(rates, key=rates.__getitem__)


def compile_sides(ours: Side, peer: Side) -> None:
    """torch.compile both as their users would: our blocks, and the peer's whole network."""
    assert isinstance(ours.network, BertForPreTraining)
    # After 8 shapes, the default limit, torch falls back to eager; the search tries more.
    torch._dynamo.config.recompile_limit = 64
    ours.network.compile_blocks()
    peer.network.compile(dynamic=False)


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def measure(
    trainers: tuple[Trainer, Trainer], sizes: tuple[int, int], steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each of `steps` steps of both sides, which alternate."""
    for trainer, size in zip(trainers, sizes, strict=True):
        for _ in range(WARMUP_STEPS):
            trainer.step(size)
    seconds = np.empty((2, steps))
    for step in range(steps):
        for side in (0, 1) if step % 2 == 0 else (1, 0):
            seconds[side, step] = trainers[side].step(sizes[side])
    return seconds[0], seconds[1]


def report(setting: Setting, trainer: Trainer, size: int, seconds: np.ndarray) -> dict[str, Any]:
    """The figures of one side."""
    lengths = trainer.rows["lengths"].double()
    tokens = float(lengths.mean()) * size
    s_eff = float(lengths.square().sum() / lengths.sum())
    rates = tokens / seconds
    peak = peak_flops(setting.device)
    num_predicted = float((trainer.rows["masked_labels"] != IGNORED_LABEL).sum())
    flops = flops_per_token(setting.config, s_eff, num_predicted / float(lengths.sum()))
    return {
        "name": trainer.side.name,
        "micro_batch_size": size,
        "tokens_per_second": spread(rates),
        "milliseconds_per_step": spread(1000 * seconds),
        "mfu": None if peak is None else float(np.median(rates)) * flops / peak,
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
        micro_batch_size: sequences per step; default 32 on a CPU, the fastest of each side on CUDA.
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
    if micro_batch_size is not None:
        sizes: tuple[int, ...] = (micro_batch_size,)
    else:
        sizes = SEARCHED_SIZES if on_gpu else (CPU_MICRO_BATCH_SIZE,)
    make_rows = partial(random_rows, config) if corpus is None else partial(corpus_rows, corpus)
    rows = for_both(make_rows(2 * max(sizes), seq_length, seed), device)
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
        **compare(setting, rows, sizes, steps, seed),
    }
    show(result)
    if output is not None:
        write_results(output, result)


def compare(
    setting: Setting, rows: Batch, sizes: tuple[int, ...], steps: int, seed: int
) -> dict[str, Any]:
    """Both sides' figures and their ratio; each side uses the fastest of `sizes`."""
    ours = make_ours(setting, seed)
    peer = make_peer(setting, ours.network)
    few = {name: tensor[:8] for name, tensor in rows.items()}
    losses = check_same_loss(ours, peer, few, setting)
    if setting.compile:
        compile_sides(ours, peer)
    trainers = (Trainer(ours, setting, rows), Trainer(peer, setting, rows))
    best = tuple(t.best_size(sizes) if len(sizes) > 1 else sizes[0] for t in trainers)
    seconds = measure(trainers, (best[0], best[1]), steps)
    sides = [report(setting, *values) for values in zip(trainers, best, seconds, strict=True)]
    rates = [size / time for size, time in zip(best, seconds, strict=True)]
    return {
        "loss_with_dropout_off": {"ours": losses[0], "peer": losses[1]},
        "ours": sides[0],
        "peer": sides[1],
        "ratio": spread(rates[0] / rates[1]),
    }


def show(result: dict[str, Any]) -> None:
    console = Console()
    for side in (result["ours"], result["peer"]):
        rate = side["tokens_per_second"]
        mfu = "" if side["mfu"] is None else f", MFU {100 * side['mfu']:.1f}%"
        console.print(
            f"{side['name']:<30} {rate['median']:>12,.0f} tokens/s "
            f"({rate['p20']:,.0f} to {rate['p80']:,.0f}; batch {side['micro_batch_size']}{mfu})"
        )
    ratio = result["ratio"]
    console.print(f"ratio {ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})")
