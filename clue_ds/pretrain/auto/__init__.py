"""What `auto` means for a run: settings that are chosen from its devices.

Guarantees: all ranks choose the same; a run that continues keeps the precision of its checkpoint,
and its micro-batches, if the ranks still divide the batch by them and they fit on every GPU;
the value replaces `auto` in the config of the run, so that the log, RUN/config.yaml and the
checkpoints name it (model.kernels stays `auto` there, because it is chosen for each operation), and
one note says what was chosen and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clue_ds import dist
from clue_ds.config import RunConfig
from clue_ds.pretrain.auto import compiled, kernels, micro_batch, precision

if TYPE_CHECKING:  # `clue-ds plan --help` imports this package, and torch takes a second
    import torch

    from clue_ds.checkpoint.manifest import Choice
    from clue_ds.data import SampleStream
    from clue_ds.pretrain.resume import RunIdentity


def on_this_machine(config: RunConfig) -> RunConfig:
    """The config as this machine alone would resolve it, before ranks and checkpoint are known.

    On a GPU nothing is tried yet: micro-batches have a CPU's size, and nothing is compiled.
    """
    config = precision.with_precision(config, precision.precision_on(dist.device())[0])
    config = compiled.with_compile(config, False)
    return micro_batch.without_trial(config, dist.world_size())


def resolve(
    identity: RunIdentity,
    choice: Choice | None,
    device: torch.device,
    streams: Sequence[SampleStream],
) -> tuple[RunIdentity, list[str]]:
    """The run with a value in place of every `auto`, and notes for the user.

    Every rank must call it. `choice`: the checkpoint that the run continues from. `streams`: of
    each phase.
    """
    config, notes = precision.choose(identity.config, choice, device)
    notes += kernels.choose(config, identity.model, device)
    config, notes_on_code = compiled.choose(config, device)
    identity = dataclasses.replace(identity, config=config)
    config, notes_on_size = micro_batch.choose(identity, choice, device, streams)
    return dataclasses.replace(identity, config=config), notes + notes_on_code + notes_on_size
