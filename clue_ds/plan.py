"""`clue-ds plan`: what a run will need, by arithmetic, before anything is started.

Guarantees: parameters are counted on the real network (without memory for it), batches by the same
methods that training uses; checkpoint sizes agree with real checkpoints (tests/test_plan.py). Times
rest on an assumed share of the device's peak and say so; activations are an estimate.

Formulas: docs/scaling.md. Source of the activation rule: Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", section 4.1, without its attention matrices,
which fused attention doesn't keep.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from clue_ds import config as run_config
from clue_ds import presets
from clue_ds.config import RunConfig
from clue_ds.data import Corpus
from clue_ds.errors import UserError
from clue_ds.metrics import PEAK_FLOPS, flops_per_token, format_seconds
from clue_ds.model.bert import BertForPreTraining, pad_vocab
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import ds_json

GIB = 2**30
STAGES = (0, 1, 2, 3)
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES, MOMENT_BYTES = 4, 8
# CUDA context, NCCL, cuBLAS, copies of gradients, and fragmentation.
RESERVED_GIB = 4.0
# A rank on a CPU without its model: Python, torch, DeepSpeed, numba (measured: docs/scaling.md).
PROCESS_GIB = 0.4


@dataclass(frozen=True)
class Machine:
    """`peak_flops` of one GPU; bandwidths are bytes/s of one GPU in one direction."""

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
    """Parameters of the network as it is trained: heads and padded vocabulary rows included."""
    with torch.device("meta"):
        network = BertForPreTraining(model, padded_vocab_size=pad_vocab(model).vocab_size)
    return sum(p.numel() for p in network.parameters())


def state_bytes(num_parameters: int, precision: str, stage: int, num_gpus: int) -> float:
    """Weights, gradients, master weights and moments on one GPU."""
    weights = BYTES_OF[precision]
    # Above stage 0 gradients are added up in fp32 (pretrain/ds_json.py).
    grads: float = 4 if stage else BYTES_OF[precision]
    master = MASTER_BYTES if stage or precision != "fp32" else 0
    optimizer = (master + MOMENT_BYTES) / (num_gpus if stage >= 1 else 1)
    grads /= num_gpus if stage >= 2 else 1
    return num_parameters * (weights / (num_gpus if stage == 3 else 1) + grads + optimizer)


def activation_bytes(config: RunConfig, model: ModelConfig) -> float:
    """What the backward pass of one micro-batch needs kept; an estimate."""
    tokens = config.train.micro_batch_size * config.data.seq_length
    wide = BYTES_OF[config.train.precision] / 2
    a_block = 18 * model.hidden_size + 4 * model.intermediate_size
    predicted = config.train.micro_batch_size * config.data.num_predictions()
    logits = predicted * pad_vocab(model).vocab_size * 12  # in the run's type, fp32, and gradient
    return tokens * a_block * model.num_hidden_layers * wide + logits


def gpu_bytes(run: RunConfig, model: ModelConfig, stage: int, num_gpus: int) -> float:
    """What one GPU holds, beside RESERVED_GIB: state and activations, and at the start fp32."""
    num_parameters = count_parameters(model)
    running = state_bytes(num_parameters, run.train.precision, stage, num_gpus)
    # Stage 3 too gets the model whole before it shards it.
    return max(running + activation_bytes(run, model), 4 * num_parameters)


def cpu_bytes(run: RunConfig, model: ModelConfig, stage: int, num_ranks: int) -> float:
    """Resident memory of one rank on a CPU at its peak: as on a GPU, the process, and gradients.

    DeepSpeed 0.19.8 copies the gradients into a flat buffer to send them (stage 0); stages 1 to 3
    fill a bucket with them, send a copy of it, and keep the rank's own part; stage 3 also gathers
    the weights that it has sharded.
    """
    grads, own = BYTES_OF[run.train.precision], 4 / num_ranks
    copies = {0: grads, 1: 2 * grads + own, 2: 3 * grads, 3: 6 * grads}[stage]
    buffers = copies * count_parameters(model)
    return PROCESS_GIB * GIB + gpu_bytes(run, model, stage, num_ranks) + buffers


def checkpoint_bytes(num_parameters: int, precision: str, stage: int) -> int:
    """One checkpoint on disk, of all ranks together."""
    master = MASTER_BYTES if stage or precision != "fp32" else 0
    return num_parameters * (BYTES_OF[precision] + master + MOMENT_BYTES)


def communication_bytes(
    num_parameters: int, precision: str, stage: int, num_gpus: int, num_parts: int = 1
) -> float:
    """What one GPU sends in a step of `num_parts` forward passes, by rings.

    As DeepSpeed 0.19.8 does it: stage 0 all-reduces the gradients once a step (2 units of weights);
    stage 1 then gathers the weights that others have updated (1 more); stage 2 all-reduces every
    part's; stage 3 gathers the weights twice a part, and reduces and scatters the gradients.
    """
    units = {0: 2, 1: 3, 2: 2 * num_parts + 1, 3: 3 * num_parts}[stage]
    return units * num_parameters * BYTES_OF[precision] * (num_gpus - 1) / num_gpus


def recommend(needs_gib: dict[int, float], memory_gib: float) -> int | None:
    """The lowest stage that fits; sharding what fits only costs time (stage 1: half as much again
    to send as stage 0)."""
    room = memory_gib - RESERVED_GIB
    return next((stage for stage in STAGES if needs_gib[stage] <= room), None)


def plan(
    config: Path,
    gpus: int = 8,
    gpus_per_node: int = 8,
    gpu: str = "H100",
    gpu_memory: float = 80.0,
    mfu: float = 0.35,
    bandwidth: float = 25.0,
) -> None:
    """Memory, batches, checkpoints, disk and time of a run, before it is started.

    Args:
        config: the run's YAML file
        gpus: ranks in all
        gpus_per_node: ranks on one machine
        gpu: for its peak speed: H100, H800, H20, A100, A800, ...; a wrong one lists them all
        gpu_memory: GiB of one GPU
        mfu: share of the peak that you expect to reach; measure it: every run logs its own
        bandwidth: GB/s that one GPU can send to another machine (25 = 200 Gbit/s)
    """
    run = run_config.load(config)
    peak = next((value for name, value in PEAK_FLOPS if name == gpu), None)
    if peak is None:
        raise UserError(f"gpu {gpu!r} is not known; give {', '.join(n for n, _ in PEAK_FLOPS)}")
    if gpus < 1 or gpus_per_node < 1 or not 0 < mfu <= 1 or bandwidth <= 0:
        raise UserError("gpus, gpus_per_node and bandwidth must be positive, and mfu from 0 to 1")
    machine = Machine(gpus, gpus_per_node, gpu_memory, peak, mfu, bandwidth * 1e9)
    print("\n".join(describe(run, machine)))


def describe(run: RunConfig, machine: Machine) -> list[str]:
    """The plan, a fact a line."""
    directory = Path(run.data.corpus)
    corpus = Corpus(directory) if (directory / "corpus.json").is_file() else None
    own = presets.get(run.model.preset).vocab_size
    model = run.model.resolve(own if corpus is None else corpus.vocab_size)
    num_parameters = count_parameters(model)
    stage = ds_json.zero_stage(ds_json.read(run.deepspeed))
    head = (
        f"{machine.num_gpus} GPUs on {machine.num_nodes} nodes; {num_parameters:,} parameters in "
        f"{run.train.precision}, ZeRO stage {stage}"
    )
    return [
        head,
        *_batch_lines(run, machine, model, corpus),
        *_memory_lines(run, machine, model, stage),
        *_disk_lines(run, num_parameters, stage, corpus, directory),
        *_time_lines(run, machine, model, num_parameters, stage),
    ]


def _batch_lines(
    run: RunConfig, machine: Machine, model: ModelConfig, corpus: Corpus | None
) -> list[str]:
    train = run.train
    num_parts = train.gradient_accumulation_steps(machine.num_gpus)
    tokens = train.global_batch_size * run.data.seq_length
    lines = [
        f"batch       {train.global_batch_size} sequences = {machine.num_gpus} ranks x {num_parts} "
        f"parts x {train.micro_batch_size}",
        f"step        {train.global_batch_size:,} samples, {tokens:,} tokens",
        f"run         {train.steps:,} steps, {train.steps * tokens:,} tokens",
    ]
    if corpus is not None:
        epochs = train.steps * tokens / max(1, corpus.num_tokens)
        lines.append(f"corpus      {corpus.num_tokens:,} tokens: {epochs:.2f} passes over it")
    else:
        size = f"{model.vocab_size:,}, as {run.model.preset} has it"
        lines.append(f"corpus      {run.data.corpus} is not there yet; vocabulary taken as {size}")
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
    host = per_machine * (PROCESS_GIB + 4 * count_parameters(model) / GIB)
    best = recommend(needs, machine.memory_gib)
    if best is None:
        advice = "no stage fits: lower train.micro_batch_size, or take zero1_offload or more GPUs"
    elif best <= 1:
        advice = f"deepspeed: zero{best}; the model fits, and sharding more only costs time"
    else:
        advice = f"deepspeed: zero{best}; lower stages don't fit"
    room = machine.memory_gib - RESERVED_GIB
    fits = "fits" if needs[stage] <= room else "does NOT fit"
    return [
        f"memory/GPU  {each} GiB of weights, gradients, optimizer and activations, and "
        f"{RESERVED_GIB:.0f} GiB for CUDA and NCCL; this config (stage {stage}) {fits} in "
        f"{machine.memory_gib:.0f} GiB",
        f"memory/host {host:.1f} GiB a machine: {per_machine} ranks build the model in fp32 first",
        f"without GPU {on_cpu} GiB a rank, libraries and copies of gradients included",
        f"recommended {advice}",
    ]


def _disk_lines(
    run: RunConfig, num_parameters: int, stage: int, corpus: Corpus | None, directory: Path
) -> list[str]:
    size = checkpoint_bytes(num_parameters, run.train.precision, stage)
    # A new one is complete before the oldest goes.
    checkpoints = (run.checkpoint.keep + 1) * size
    shards = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) if corpus else 0
    return [
        f"checkpoint  {size / GIB:.2f} GiB every {run.checkpoint.every:,} steps",
        f"disk        {checkpoints / GIB:.2f} GiB for {run.checkpoint.keep} checkpoints and the "
        f"one being written; corpus {shards / GIB:.2f} GiB",
    ]


def _time_lines(
    run: RunConfig, machine: Machine, model: ModelConfig, num_parameters: int, stage: int
) -> list[str]:
    tokens = run.train.global_batch_size * run.data.seq_length
    share = run.data.num_predictions() / run.data.seq_length
    flops = tokens * flops_per_token(model, run.data.seq_length, share)
    computing = flops / (machine.num_gpus * machine.peak_flops * machine.mfu)
    num_parts = run.train.gradient_accumulation_steps(machine.num_gpus)
    precision, num_gpus = run.train.precision, machine.num_gpus
    sent = communication_bytes(num_parameters, precision, stage, num_gpus, num_parts)
    # Ranks of one machine share its links only when there is another machine.
    sending = sent / machine.bandwidth if machine.num_nodes > 1 else 0.0
    total = (computing + sending) * run.train.steps
    lines = [
        f"computing   {1e3 * computing:.1f} ms a step, if a GPU reaches {machine.mfu:.0%} of "
        f"{machine.peak_flops / 1e12:.0f} TFLOP/s",
    ]
    if machine.num_nodes > 1:
        lines.append(
            f"sending     {sent / 1e6:.0f} MB a GPU and step: {1e3 * sending:.1f} ms at "
            f"{machine.bandwidth / 1e9:.0f} GB/s, {sending / (computing + sending):.0%} of a step "
            "if nothing overlaps"
        )
    lines.append(f"time        {format_seconds(total)} (h:mm:ss) without start, saving, evaluation")
    return lines
