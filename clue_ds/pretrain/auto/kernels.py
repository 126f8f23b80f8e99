"""What `model.kernels: auto` is on a device: Triton for every operation that agrees with torch.

Each kernel is compared with torch on the device itself, at the sizes and in the precision of the
run (clue_ds/kernels/verify); the answer is kept in the user's cache. An operation whose kernel
disagrees on any rank's device runs in torch on all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.presets import ModelConfig

if TYPE_CHECKING:  # `clue-ds plan --help` imports this package, and torch takes a second
    import torch

    from clue_ds.model import ops


def choose(config: RunConfig, model: ModelConfig, device: torch.device) -> list[str]:
    """Choose the implementation of each operation; returns one line for the user.

    Every rank must call it. It does nothing unless `model.kernels` is `auto`. `config`: with a
    precision.
    """
    from clue_ds.model import ops

    if config.model.kernels != "auto":
        return []
    answers: list[Any] = dist.all_gather(_disagreeing(config, model, device))
    if None in answers:
        ops.choose_kernels("torch")
        no_triton = "Triton is not installed, or TRITON_INTERPRET is set"
        reason = "there is no GPU" if device.type == "cpu" else no_triton
        return [f"model.kernels auto is torch: {reason}"]
    wrong = {name: reason for answer in reversed(answers) for name, reason in answer.items()}
    ops.refuse_kernels(wrong)
    if not wrong:
        return ["model.kernels auto is triton: every kernel agrees with torch on this device"]
    named = "; ".join(f"{name} ({reason})" for name, reason in sorted(wrong.items()))
    return [
        "warning: model.kernels auto is triton, but these operations run in torch, because their "
        f"kernels do not agree with it on this device: {named}"
    ]


def _disagreeing(
    config: RunConfig, model: ModelConfig, device: torch.device
) -> dict[str, str] | None:
    """Operation -> why its kernel is not used, in any phase; None where `auto` takes no kernel."""
    from clue_ds.model import ops
    from clue_ds.pretrain.engine import DTYPES

    wrong: dict[str, str] = {}
    for sizes in sizes_of(config, model):
        verdicts = ops.check_kernels(sizes, DTYPES[config.train.precision], device)
        if verdicts is None:
            return None
        wrong |= {verdict.operation: verdict.reason for verdict in verdicts if verdict.reason}
    return wrong


def sizes_of(config: RunConfig, model: ModelConfig) -> list[ops.Sizes]:
    """The sizes at which each phase of the run calls the operations."""
    from clue_ds.model import ops

    found = []
    for number in range(max(1, len(config.phases))):
        own = config.in_phase(number)
        micro = own.train.micro_batch_size
        rows = own.train.global_batch_size if micro == "auto" else micro
        sizes = ops.sizes(model, rows, own.data.seq_length)
        found += [] if sizes in found else [sizes]
    return found


def describe(
    config: RunConfig, model: ModelConfig, device: torch.device
) -> list[tuple[str, str]] | None:
    """A line for each operation and phase, and why its kernel is not used; empty if it is.

    The line has its error and its bandwidth. None where `auto` takes no kernel. `config`: with a
    precision.
    """
    from clue_ds.model import ops
    from clue_ds.pretrain.engine import DTYPES

    dtype, found = DTYPES[config.train.precision], []
    for sizes in sizes_of(config, model):
        verdicts = ops.check_kernels(sizes, dtype, device)
        if verdicts is None:
            return None
        rates = ops.kernel_rates(sizes, dtype, device)
        for verdict in verdicts:
            line = f"{verdict.operation:<28} error {verdict.error:5.2f} of torch's"
            if (rate := rates.get(verdict.operation)) is not None:
                line += f", {rate.gb_per_s:6,.0f} GB/s, {rate.percent_of_copy:4.0f} % of a copy"
            where = f"{sizes.num_sequences} x {sizes.seq_length}, {config.train.precision}"
            found.append((f"{line} ({where}, forward and backward)", verdict.reason))
    return found
