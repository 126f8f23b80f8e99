"""`clue-ds plan`: calculates what a run will need, before anything is started.

Guarantees: parameters are counted on the real network (on the meta device, which takes no memory),
and batches by the methods that training uses; checkpoint sizes agree with real checkpoints
(tests/test_plan.py). Times assume a share of the device's peak, which the output states;
activations are an estimate.

Formulas: docs/scaling.md. The activation rule is from Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", section 4.1, without the attention matrices, which fused
attention doesn't keep.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clue_ds import command_line, files, presets
from clue_ds import config as run_config
from clue_ds.config import RunConfig
from clue_ds.data import Corpus
from clue_ds.errors import UserError
from clue_ds.metrics import PEAK_FLOPS, flops_per_token, format_seconds
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import ds_json
from clue_ds.settings.arguments import refuse_repeated

GIB = 2**30
STAGES = (0, 1, 2, 3)
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES, MOMENT_BYTES = 4, 8
# Muon keeps one moment of a matrix. At stages 1 to 3 every rank gathers all of them in bf16.
MUON_MOMENT_BYTES, MUON_GATHERED_BYTES = 4, 2
# For the CUDA context, NCCL, cuBLAS, copies of gradients, and fragmentation.
RESERVED_GIB = 4.0
# A process without a model: Python, torch, DeepSpeed, numba (measured: docs/scaling.md).
PROCESS_GIB = 0.4


MACHINE_OPTIONS: tuple[tuple[str, type[int] | type[float] | type[str], Any, str], ...] = (
    ("--gpus", int, 8, "number of GPUs on all machines, which is the number of ranks"),
    ("--gpus-per-node", int, 8, "number of GPUs on one machine"),
    ("--gpu", str, "H100", "the GPU's name, from which its peak follows; an unknown one lists all"),
    ("--gpu-memory", float, 80.0, "memory of one GPU in GiB"),
    ("--mfu", float, 0.35, "share of the peak that you expect; every run logs the one it measures"),
    ("--bandwidth", float, 25.0, "GB/s that one GPU can send to another machine: 25 is 200 Gbit/s"),
)


@dataclass(frozen=True)
class Machine:
    """`peak_flops` is that of one GPU; `bandwidth` is in bytes/s per GPU and direction."""

    num_gpus: int
    gpus_per_node: int
    memory_gib: float
    peak_flops: float
    mfu: float
    bandwidth: float

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)


@functools.cache
def count_parameters(model: ModelConfig) -> int:
    """Parameters of the network in training, heads and vocabulary padding included."""
    import torch

    from clue_ds.model.bert import BertForPreTraining, pad_vocab

    with torch.device("meta"):
        network = BertForPreTraining(model, padded_vocab_size=pad_vocab(model).vocab_size)
    return sum(p.numel() for p in network.parameters())


@functools.cache
def count_muon_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices that `train.optimizer: muon` updates with Muon."""
    import torch

    from clue_ds.model.bert import BertForPreTraining
    from clue_ds.pretrain import optim

    with torch.device("meta"):
        network = BertForPreTraining(model)
    return sum(p.numel() for name, p in network.named_parameters() if optim.is_muon(name, p))


def moment_bytes(run: RunConfig, model: ModelConfig) -> float:
    """Bytes that the optimizer's moments take per parameter, on average."""
    if run.train.optimizer != "muon":
        return MOMENT_BYTES
    share = count_muon_parameters(model) / count_parameters(model)
    return MOMENT_BYTES - (MOMENT_BYTES - MUON_MOMENT_BYTES) * share


def state_bytes(
    num_parameters: int,
    precision: str,
    stage: int,
    num_gpus: int,
    moments: float = MOMENT_BYTES,
) -> float:
    """Weights, gradients, master weights and moments (bytes per parameter) on one GPU."""
    weights = BYTES_OF[precision]
    # From stage 1 on, gradients are accumulated in fp32 (pretrain/ds_json.py).
    grads: float = 4 if stage else BYTES_OF[precision]
    master = MASTER_BYTES if stage or precision != "fp32" else 0
    optimizer = (master + moments) / (num_gpus if stage >= 1 else 1)
    grads /= num_gpus if stage >= 2 else 1
    return num_parameters * (weights / (num_gpus if stage == 3 else 1) + grads + optimizer)


def activation_bytes(config: RunConfig, model: ModelConfig) -> float:
    """Estimated memory for activations that the backward pass of one micro-batch needs."""
    from clue_ds.model.bert import pad_vocab

    tokens = config.train.micro_batch_size * config.data.seq_length
    wide = BYTES_OF[config.train.precision] / 2
    per_token = 18 * model.hidden_size + 4 * model.intermediate_size
    predicted = config.train.micro_batch_size * config.data.num_predictions()
    logits = (
        predicted * pad_vocab(model).vocab_size * 12
    )  # in the run's type and in fp32, and their gradient
    return tokens * per_token * model.num_hidden_layers * wide + logits


def gpu_bytes(run: RunConfig, model: ModelConfig, stage: int, num_gpus: int) -> float:
    """Peak memory of one GPU besides RESERVED_GIB: training, or the fp32 model at the start."""
    num_parameters = count_parameters(model)
    moments = moment_bytes(run, model)
    running = state_bytes(num_parameters, run.train.precision, stage, num_gpus, moments)
    # Muon gathers when the activations are gone.
    temporary = max(activation_bytes(run, model), muon_gathered_bytes(run, model, stage))
    # Stage 3, too, receives the whole model before it shards it.
    return max(running + temporary, 4 * num_parameters)


def muon_gathered_bytes(run: RunConfig, model: ModelConfig, stage: int) -> int:
    """Momentum of all matrices that a rank gathers at each step, in bytes."""
    if run.train.optimizer != "muon" or stage == 0:
        return 0
    return MUON_GATHERED_BYTES * count_muon_parameters(model)


def cpu_bytes(run: RunConfig, model: ModelConfig, stage: int, num_ranks: int) -> float:
    """Peak resident memory of one rank on a CPU: gpu_bytes, the process, and copies of gradients.

    DeepSpeed 0.19.8 copies the gradients into a flat buffer to send them (stage 0). Stages 1 to 3
    fill a bucket with them, send a copy of it, and keep the rank's own shard; stage 3 also gathers
    the weights that it has sharded.
    """
    grads, own = BYTES_OF[run.train.precision], 4 / num_ranks
    copies = {0: grads, 1: 2 * grads + own, 2: 3 * grads, 3: 6 * grads}[stage]
    buffers = copies * count_parameters(model)
    return PROCESS_GIB * GIB + gpu_bytes(run, model, stage, num_ranks) + buffers


def checkpoint_bytes(
    num_parameters: int, precision: str, stage: int, moments: float = MOMENT_BYTES
) -> float:
    """Size of one checkpoint on disk, all ranks together."""
    master = MASTER_BYTES if stage or precision != "fp32" else 0
    return num_parameters * (BYTES_OF[precision] + master + moments)


def copied_bytes(
    run: RunConfig, model: ModelConfig, stage: int, num_ranks: int, ranks_per_host: int
) -> float:
    """Host memory for the copy that is saved in the background, on rank 0's host; most of all.

    Rank 0 copies the weights, and each rank its part of the optimizer's state (stage 0: rank 0).
    """
    if not run.checkpoint.async_save:
        return 0.0
    num_parameters, precision = count_parameters(model), run.train.precision
    moments = moment_bytes(run, model)
    weights = num_parameters * BYTES_OF[precision]
    optimizer = checkpoint_bytes(num_parameters, precision, stage, moments) - weights
    share = ranks_per_host / num_ranks if stage else 1
    return (weights if stage < 3 else 0) + optimizer * share


def communication_bytes(
    num_parameters: int, precision: str, stage: int, num_gpus: int, num_micro_batches: int = 1
) -> float:
    """Bytes that one GPU sends per step with ring collectives, as DeepSpeed 0.19.8 does it.

    In units of the weights' size: stage 0 all-reduces the gradients once per step (2 units); stage
    1 also gathers the weights that other ranks have updated (1 more); stage 2 all-reduces the
    gradients of every micro-batch; stage 3 gathers the weights twice per micro-batch, and
    reduce-scatters the gradients.
    """
    units = {0: 2, 1: 3, 2: 2 * num_micro_batches + 1, 3: 3 * num_micro_batches}[stage]
    return units * num_parameters * BYTES_OF[precision] * (num_gpus - 1) / num_gpus


def recommend(needs_gib: dict[int, float], memory_gib: float) -> int | None:
    """The lowest stage that fits; None if none does.

    Sharding a model that fits only costs time: stage 1 sends half as much again as stage 0.
    """
    room = memory_gib - RESERVED_GIB
    return next((stage for stage in STAGES if needs_gib[stage] <= room), None)


def plan(
    config: Path | RunConfig,
    gpus: int = 8,
    gpus_per_node: int = 8,
    gpu: str = "H100",
    gpu_memory: float = 80.0,
    mfu: float = 0.35,
    bandwidth: float = 25.0,
) -> None:
    """Calculate the memory, batches, checkpoints, disk space and time of a run before it starts.

    Args:
        config: the run's YAML file, or its settings
        gpus: number of GPUs on all machines, which is the number of ranks
        gpus_per_node: number of GPUs on one machine
        gpu: the GPU's name, from which its peak follows: H100, H800, H20, A100, A800, ...; an
            unknown name lists all
        gpu_memory: memory of one GPU in GiB
        mfu: share of the peak that you expect to reach; every run logs the one it measures
        bandwidth: GB/s that one GPU can send to another machine (25 is 200 Gbit/s)
    """
    run = config if isinstance(config, RunConfig) else run_config.load(config)
    peak = next((value for name, value in PEAK_FLOPS if name == gpu), None)
    if peak is None:
        raise UserError(
            f"gpu {gpu!r} is not known; give one of {', '.join(n for n, _ in PEAK_FLOPS)}"
        )
    if gpus < 1 or gpus_per_node < 1 or not 0 < mfu <= 1 or bandwidth <= 0:
        raise UserError("--gpus, --gpus-per-node and --bandwidth must be positive, --mfu in (0, 1]")
    machine = Machine(gpus, gpus_per_node, gpu_memory, peak, mfu, bandwidth * 1e9)
    print("\n".join(describe(run, machine)))


def main(argv: list[str]) -> None:
    """Calculate the memory, batches, disk space and time of a run before it starts.

    The settings are those of `clue-ds pretrain`, from a file and from the command line.
    """
    parser = argparse.ArgumentParser(
        prog="clue-ds plan",
        description=main.__doc__,
        epilog="every setting of the run can be given as well: --train.micro-batch-size 16 "
        "(`clue-ds pretrain --help` lists them)",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="the run's YAML file")
    for name, kind, default, text in MACHINE_OPTIONS:
        shown = f"{text} (default: {default})"
        parser.add_argument(name, type=kind, default=default, metavar=kind.__name__, help=shown)
    refuse_repeated(argv)
    given, settings = parser.parse_known_args(argv)
    machine = vars(given)
    file = machine.pop("config")
    settings += [] if file is None else ["--config", file]
    plan(command_line.parse(settings, "clue-ds plan"), **machine)


def describe(run: RunConfig, machine: Machine) -> list[str]:
    """The plan, one fact per line."""
    directory = Path(run.data.corpus)
    corpus = Corpus(directory) if (directory / "corpus.json").is_file() else None
    own = presets.get(run.model.preset).vocab_size
    model = run.model.resolve(own if corpus is None else corpus.vocab_size)
    num_parameters = count_parameters(model)
    stage = ds_json.zero_stage(ds_json.read(run.deepspeed))
    parts = run.by_phase()
    largest = max(parts, key=lambda part: activation_bytes(part, model))
    head = (
        f"{machine.num_gpus} GPUs on {machine.num_nodes} nodes; {num_parameters:,} parameters in "
        f"{run.train.precision}, ZeRO stage {stage}"
    )
    return [
        head,
        *_batch_lines(parts, machine, model, corpus),
        *_memory_lines(largest, machine, model, stage),
        *_disk_lines(run, model, stage, corpus, directory),
        *_time_lines(parts, machine, model, num_parameters, stage),
    ]


def _phase_line(parts: list[RunConfig], number: int) -> list[str]:
    """What begins the lines of a phase; nothing in a run without phases."""
    steps, length = parts[number].train.steps, parts[number].data.seq_length
    return [f"phase {number + 1:<5} {steps:,} steps of length {length}"] if len(parts) > 1 else []


def _batch_lines(
    parts: list[RunConfig], machine: Machine, model: ModelConfig, corpus: Corpus | None
) -> list[str]:
    lines, steps, total = [], 0, 0
    for number, run in enumerate(parts):
        train = run.train
        num_micro_batches = train.gradient_accumulation_steps(machine.num_gpus)
        tokens = train.global_batch_size * run.data.seq_length
        steps, total = steps + train.steps, total + train.steps * tokens
        lines += [
            *_phase_line(parts, number),
            f"batch       {train.global_batch_size} sequences = {machine.num_gpus} ranks x "
            f"{num_micro_batches} micro-batches x {train.micro_batch_size}",
            f"step        {train.global_batch_size:,} samples, {tokens:,} tokens",
        ]
    lines.append(f"run         {steps:,} steps, {total:,} tokens")
    if corpus is not None:
        epochs = total / max(1, corpus.num_tokens)
        lines.append(f"corpus      {corpus.num_tokens:,} tokens, read {epochs:.2f} times")
    else:
        lines.append(
            f"corpus      {parts[0].data.corpus} does not exist yet; assuming the "
            f"{model.vocab_size:,} words of {parts[0].model.preset}'s vocabulary"
        )
    return lines


def _memory_lines(run: RunConfig, machine: Machine, model: ModelConfig, stage: int) -> list[str]:
    num_ranks = machine.num_gpus
    needs = {s: gpu_bytes(run, model, s, num_ranks) / GIB for s in STAGES}
    on_cpus = {s: cpu_bytes(run, model, s, num_ranks) / GIB for s in STAGES}
    each, on_cpu = (
        ", ".join(f"stage {s}: {need:.1f}" for s, need in sizes.items())
        for sizes in (needs, on_cpus)
    )
    per_machine = min(machine.gpus_per_node, num_ranks)
    copied = copied_bytes(run, model, stage, num_ranks, per_machine)
    host = per_machine * (PROCESS_GIB + 4 * count_parameters(model) / GIB)
    best = recommend(needs, machine.memory_gib)
    if best is None:
        advice = "no stage fits: lower train.micro_batch_size, or use zero1_offload or more GPUs"
    elif best <= 1:
        advice = f"deepspeed: zero{best}; the model fits, and sharding more only costs time"
    else:
        advice = f"deepspeed: zero{best}; lower stages don't fit"
    room = machine.memory_gib - RESERVED_GIB
    fits = "fits" if needs[stage] <= room else "does NOT fit"
    return [
        f"memory/GPU  {each} GiB for weights, gradients, optimizer and activations, plus "
        f"{RESERVED_GIB:.0f} GiB for CUDA and NCCL; this config (stage {stage}) {fits} in "
        f"{machine.memory_gib:.0f} GiB",
        f"memory/host {host:.1f} GiB per host: {per_machine} ranks build the model in fp32 first",
        f"without GPU {on_cpu} GiB per rank, libraries and copies of gradients included",
        f"saving      {files.size_text(copied)} more per host for the copy of the state that is "
        "written while training goes on (checkpoint.async_save)",
        f"recommended {advice}",
    ]


def _disk_lines(
    run: RunConfig, model: ModelConfig, stage: int, corpus: Corpus | None, directory: Path
) -> list[str]:
    from clue_ds.checkpoint import retention

    moments = moment_bytes(run, model)
    size = checkpoint_bytes(count_parameters(model), run.train.precision, stage, moments)
    number = retention.most_on_disk(run)
    shards = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) if corpus else 0
    return [
        f"checkpoint  {files.size_text(size)} every {run.checkpoint.every:,} steps",
        f"disk        {files.size_text(number * size)} for {number - 1} checkpoints and the "
        f"one being written; corpus {files.size_text(shards)}",
    ]


def _time_lines(
    parts: list[RunConfig], machine: Machine, model: ModelConfig, num_parameters: int, stage: int
) -> list[str]:
    num_gpus, total, lines = machine.num_gpus, 0.0, []
    for number, run in enumerate(parts):
        tokens = run.train.global_batch_size * run.data.seq_length
        share = run.data.num_predictions() / run.data.seq_length
        flops = tokens * flops_per_token(model, run.data.seq_length, share)
        computing = flops / (num_gpus * machine.peak_flops * machine.mfu)
        sizes = num_parameters, run.train.precision, stage, num_gpus
        sent = communication_bytes(*sizes, run.train.gradient_accumulation_steps(num_gpus))
        sent += muon_gathered_bytes(run, model, stage) * (num_gpus - 1) / num_gpus
        # Within one machine GPUs use its internal links, whose time is neglected.
        sending = sent / machine.bandwidth if machine.num_nodes > 1 else 0.0
        total += (computing + sending) * run.train.steps
        lines += _phase_line(parts, number)
        lines.append(
            f"computing   {1e3 * computing:.1f} ms per step if a GPU reaches {machine.mfu:.0%} of "
            f"{machine.peak_flops / 1e12:.0f} TFLOP/s"
        )
        if machine.num_nodes > 1:
            lines.append(
                f"sending     {sent / 1e6:.0f} MB per GPU and step: {1e3 * sending:.1f} ms at "
                f"{machine.bandwidth / 1e9:.0f} GB/s, {sending / (computing + sending):.0%} of a "
                "step if nothing overlaps"
            )
    time = f"time        {format_seconds(total)} (h:mm:ss)"
    return [*lines, f"{time} without start-up, saving and evaluation"]
