"""`clue-ds plan`: calculates what a run will need, before anything is started.

Guarantees: memory is calculated by pretrain/auto/memory.py, and batches by the methods that
training uses. Times assume a share of the device's peak, which the output states.

Formulas: docs/scaling.md.
"""

from __future__ import annotations

import argparse
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
from clue_ds.pretrain.auto.memory import (
    BYTES_OF,
    GIB,
    PROCESS_GIB,
    RESERVED_GIB,
    activation_bytes,
    checkpoint_bytes,
    copied_bytes,
    count_parameters,
    cpu_bytes,
    gpu_bytes,
    moment_bytes,
    muon_gathered_bytes,
)
from clue_ds.pretrain.auto.micro_batch import largest_that_fits, with_sizes
from clue_ds.pretrain.auto.precision import with_precision
from clue_ds.settings.arguments import refuse_repeated

STAGES = (0, 1, 2, 3)
WITHOUT_BF16 = "V100"


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
    """`peak_flops` is that of one GPU; `bandwidth` is in bytes/s per GPU and direction.

    `has_bf16`: whether `train.precision: auto` is bf16 on these GPUs.
    """

    num_gpus: int
    gpus_per_node: int
    memory_gib: float
    peak_flops: float
    mfu: float
    bandwidth: float
    has_bf16: bool = True

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.gpus_per_node)


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


def recommend(
    needs_gib: dict[int, float], memory_gib: float, precision: str = "fp32"
) -> int | None:
    """The lowest stage that fits; None if none does. In bf16, stage 0 only if no other fits.

    Sharding a model that fits only costs time: stage 1 sends half as much again as stage 0. But in
    bf16 DeepSpeed's optimizer of stage 0 waits for the GPU twice per parameter and step.
    """
    room = memory_gib - RESERVED_GIB
    stages = (1, 2, 3, 0) if precision == "bf16" else STAGES
    return next((stage for stage in stages if needs_gib[stage] <= room), None)


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
    has_bf16 = not gpu.startswith(WITHOUT_BF16)
    machine = Machine(gpus, gpus_per_node, gpu_memory, peak, mfu, bandwidth * 1e9, has_bf16)
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
    is_auto = run.train.precision == "auto"
    run = with_precision(run, "bf16" if machine.has_bf16 else "fp32")
    directory = Path(run.data.corpus)
    corpus = Corpus(directory) if (directory / "corpus.json").is_file() else None
    own = presets.get(run.model.preset).vocab_size
    model = run.model.resolve(own if corpus is None else corpus.vocab_size)
    num_parameters = count_parameters(model)
    stage = ds_json.zero_stage(ds_json.read(run.deepspeed))
    run, has_auto = _with_micro_batches(run, machine, model, stage)
    parts = run.by_phase()
    largest = max(parts, key=lambda part: activation_bytes(part, model))
    head = (
        f"{machine.num_gpus} GPUs on {machine.num_nodes} nodes; {num_parameters:,} parameters in "
        f"{run.train.precision}{' (train.precision auto)' if is_auto else ''}, ZeRO stage {stage}"
    )
    return [
        head,
        *_batch_lines(parts, machine, model, corpus, has_auto),
        *_memory_lines(largest, machine, model, stage),
        *_disk_lines(run, model, stage, corpus, directory),
        *_time_lines(parts, machine, model, num_parameters, stage),
    ]


def _phase_line(parts: list[RunConfig], number: int) -> list[str]:
    """What begins the lines of a phase; nothing in a run without phases."""
    steps, length = parts[number].train.steps, parts[number].data.seq_length
    return [f"phase {number + 1:<5} {steps:,} steps of length {length}"] if len(parts) > 1 else []


def _with_micro_batches(
    run: RunConfig, machine: Machine, model: ModelConfig, stage: int
) -> tuple[RunConfig, bool]:
    """The run with an estimate for each `train.micro_batch_size: auto`, and whether it has any."""
    room, sizes, has_auto = (machine.memory_gib - RESERVED_GIB) * GIB, [], False
    for number in range(max(1, len(run.phases))):
        own = run.in_phase(number)
        if own.train.micro_batch_size != "auto":
            sizes.append(own.train.micro_batch())
            continue

        def peak(size: int, own: RunConfig = own) -> float:
            train = own.train.model_copy(update={"micro_batch_size": size})
            tried = own.model_copy(update={"train": train})
            return gpu_bytes(tried, model, stage, machine.num_gpus)

        fit = largest_that_fits(own.train.share(machine.num_gpus), peak, room)
        sizes.append(1 if fit is None else fit.size)
        has_auto = True
    return with_sizes(run, sizes), has_auto


def _batch_lines(
    parts: list[RunConfig],
    machine: Machine,
    model: ModelConfig,
    corpus: Corpus | None,
    is_auto: bool,
) -> list[str]:
    lines, steps, total, passes = [], 0, 0, 0.0
    note = " (train.micro_batch_size auto, estimated; a run measures it)" if is_auto else ""
    for number, run in enumerate(parts):
        train = run.train
        num_micro_batches = train.gradient_accumulation_steps(machine.num_gpus)
        tokens = train.global_batch_size * run.data.seq_length
        steps, total = steps + train.steps, total + train.steps * tokens
        if corpus is not None:
            passes += train.steps * train.global_batch_size / _num_samples(run)
        lines += [
            *_phase_line(parts, number),
            f"batch       {train.global_batch_size} sequences = {machine.num_gpus} ranks x "
            f"{num_micro_batches} micro-batches x {train.micro_batch()}{note}",
            f"step        {train.global_batch_size:,} samples, at most {tokens:,} tokens",
        ]
    lines.append(f"run         {steps:,} steps, at most {total:,} tokens")
    if corpus is not None:
        lines.append(f"corpus      {corpus.num_tokens:,} tokens, read {passes:.2f} times")
    else:
        lines.append(
            f"corpus      {parts[0].data.corpus} does not exist yet; assuming the "
            f"{model.vocab_size:,} words of {parts[0].model.preset}'s vocabulary"
        )
    return lines


def _num_samples(run: RunConfig) -> int:
    """Rows in one pass over the corpus, which are short where a row holds one document."""
    from clue_ds.pretrain import batches

    return batches.make_stream(run, batches.open_data(run)).num_samples


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
    best = recommend(needs, machine.memory_gib, run.train.precision)
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
