"""What a run takes in memory and on disk, calculated from its settings.

Guarantees: parameters are counted on the real network (on the meta device, which takes no memory);
checkpoint sizes agree with real checkpoints (tests/test_plan.py). Activations are an estimate, by
the rule of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models", section 4.1, without the attention matrices, which fused attention doesn't keep.

Formulas: docs/scaling.md.
"""

from __future__ import annotations

import functools

from clue_ds.config import RunConfig
from clue_ds.presets import ModelConfig

GIB = 2**30
BYTES_OF = {"fp32": 4, "bf16": 2, "fp16": 2}
MASTER_BYTES, MOMENT_BYTES = 4, 8
# Muon keeps one moment of a matrix. At stages 1 to 3 every rank gathers all of them in bf16.
MUON_MOMENT_BYTES, MUON_GATHERED_BYTES = 4, 2
# For the CUDA context, NCCL, cuBLAS, copies of gradients, and fragmentation.
RESERVED_GIB = 4.0
# A process without a model: Python, torch, DeepSpeed, numba (measured: docs/scaling.md).
PROCESS_GIB = 0.4


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

    rows = config.train.micro_batch()
    tokens = rows * config.data.seq_length
    wide = BYTES_OF[config.train.precision] / 2
    per_token = 18 * model.hidden_size + 4 * model.intermediate_size
    predicted = rows * config.data.num_predictions()
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
