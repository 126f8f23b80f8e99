"""What `train.precision: auto` is on a device.

It is bf16 where every rank's device computes in it faster than in fp32. On a CPU that is decided by
the instructions that it has, and not by a measurement, because two starts of one run must choose
the same. fp16 is never chosen: it needs a loss scale, and may skip updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.job import preflight
from clue_ds.pretrain import ds_json

if TYPE_CHECKING:  # `clue-ds plan --help` imports this module, and torch takes a second
    import torch

    from clue_ds.checkpoint.manifest import Choice


def precision_on(device: torch.device, cpuinfo: Path | None = None) -> tuple[str, str]:
    """The precision that `auto` means on this device, and why."""
    import torch

    if device.type == "cpu":
        if preflight.has_bf16_units(cpuinfo):
            return "bf16", "this processor has instructions for bf16"
        return "fp32", "this processor has no instructions for bf16 (avx512_bf16, amx_bf16)"
    name = dist.device_name(device)
    # A CUDA device that has no units for bf16 emulates it; the others have units or nothing.
    options = {"including_emulation": False} if device.type == "cuda" else {}
    if torch.get_device_module(device).is_bf16_supported(**options):
        return "bf16", f"the {name} computes in it"
    return "fp32", f"the {name} has no bf16; fp16 is faster there, and may skip updates"


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    """The config with `precision` in place of `auto`; a precision that the user set stays."""
    if config.train.precision != "auto":
        return config
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train})


def choose(
    config: RunConfig, choice: Choice | None, device: torch.device
) -> tuple[RunConfig, list[str]]:
    """The config with one precision for all ranks, and notes for the user; on every rank.

    `choice`: the checkpoint that the run continues from, whose precision it keeps.
    """
    if config.train.precision == "auto":
        precision, reason = _agreed(choice, device)
        config = with_precision(config, precision)
        notes = [f"train.precision auto is {precision}: {reason}"]
    else:
        notes = preflight.slow_precision(config.train.precision, device)
    return config, notes + _slow_stage(config)


def _agreed(choice: Choice | None, device: torch.device) -> tuple[str, str]:
    if choice is not None:
        return choice.manifest.precision, "the run continues in the precision of its checkpoint"
    answers: list[Any] = dist.all_gather(precision_on(device))
    slow = (rank for rank, (precision, _) in enumerate(answers) if precision == "fp32")
    rank = next(slow, 0)
    precision, reason = answers[rank]
    return precision, reason if rank == 0 else f"on rank {rank}, {reason}"


def _slow_stage(config: RunConfig) -> list[str]:
    """A warning for bf16 at ZeRO stage 0, whose optimizer waits for the device at every parameter.

    Counted in DeepSpeed 0.19.8 in one step of roberta_tiny_clue: 153 waits at stage 0, 4 at stage
    1; of bert_base: 409 and 4.
    """
    if config.train.precision != "bf16" or ds_json.zero_stage(ds_json.read(config.deepspeed)):
        return []
    return [
        "warning: in bf16 at ZeRO stage 0 DeepSpeed waits for the device twice per parameter and "
        "step; set deepspeed zero1, which is faster on one rank too"
    ]
