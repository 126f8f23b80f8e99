"""Does a run continue, from where, and is it still the same run?

Guarantees: the newest checkpoint that verifies is chosen; damaged ones are named and set aside;
a change of settings that would make it another run is refused with every difference, before any
rank has unpickled anything.

train.steps may not change under linear and cosine: the learning rate of every earlier step depends
on it. Under wsd it may, as long as neither the old nor the new decay has begun.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint.manifest import Choice
from clue_ds.config import RunConfig
from clue_ds.data.stream.samples import STREAM_VERSION
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.pretrain import ds_json

# What may differ between the run that saved and the run that resumes: where things lie, how often
# they are written, and how the same arithmetic is carried out.
MAY_CHANGE = {
    "run_dir",
    "deepspeed",  # compared as stage and offload
    "data.corpus",  # compared by its fingerprint
    "data.mixture",  # in that fingerprint, with its shares
    "train.micro_batch_size",
    "data.held_out",
    "data.pairs",  # compared by their content's fingerprint
    "evaluate.every",
    "evaluate.batches",
    "model.attention",
    "model.kernels",
    "model.compile",
    "model.init",  # where a run began, not where it goes
    "checkpoint.every",
    "checkpoint.keep",
    "log.every",
    "log.tensorboard",
    *(f"health.{name}" for name in run_config.HealthSection.model_fields),
}


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint must remember of the run, beside weights and step."""

    config: RunConfig
    model: ModelConfig
    vocab_file: Path
    vocab_sha256: str
    lower_case: bool
    corpus_fingerprint: str


def choose(identity: RunIdentity) -> Choice | None:
    """The checkpoint that this run continues from; None when it starts from the beginning.

    Rank 0 reads and compares the files, all ranks get its answer. Damaged directories are set
    aside as step-N.damaged. UserError when the newest one belongs to a different run.
    """
    choice, error = None, None
    if dist.rank() == 0:
        try:
            choice = manifests.newest(identity.config.run_dir)
            if choice is not None:
                _check_same_run(choice, identity)
                _set_aside(choice)
        except UserError as refusal:
            error = str(refusal)
    dist.agree(error)
    return dist.broadcast(choice)


def describe(choice: Choice) -> list[str]:
    """What the user should know: which checkpoint, and why not a newer one."""
    skipped = [
        f"passed over {directory.name} (now {directory.name}.damaged): {reason}"
        for directory, reason in choice.skipped.items()
    ]
    chosen = f"resuming after step {choice.manifest.step}: the newest intact checkpoint is"
    return [*skipped, f"{chosen} {choice.directory}"]


def _set_aside(choice: Choice) -> None:
    for directory in choice.skipped:
        aside = directory.with_name(directory.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)


def differences(saved: RunConfig, now: RunConfig, step: int) -> list[str]:
    """Settings whose change would make the continued run another run than the one that saved."""
    changed = []
    flat_now = dict(run_config.flatten(now.model_dump(), MAY_CHANGE))
    for key, old in run_config.flatten(saved.model_dump(), MAY_CHANGE):
        new = flat_now[key]
        if old != new and key not in MAY_CHANGE:
            changed.append(f"{key} was {old!r}, is {new!r}")
    # Warm-up-stable-decay is made for this: until the decay begins, its past doesn't know its end.
    if saved.train.schedule == now.train.schedule == "wsd":
        began = [c.train.steps - c.train.decay_steps for c in (saved, now)]
        if step <= min(began):
            free = ("train.steps ", "train.decay_steps ")
            changed = [line for line in changed if not line.startswith(free)]
    return changed


def _check_same_run(choice: Choice, identity: RunIdentity) -> None:
    saved, where = choice.manifest, choice.directory
    elsewhere = "or give another run_dir to start a new run"
    if saved.vocab_sha256 != identity.vocab_sha256:
        raise UserError(
            f"{where} was trained with another vocabulary than the corpus "
            f"{identity.config.data.corpus} has; give the corpus of that run, {elsewhere}"
        )
    if saved.corpus_fingerprint != identity.corpus_fingerprint:
        raise UserError(
            f"the corpus {identity.config.data.corpus} has changed since {where} was saved; "
            f"restore it, {elsewhere} (model.init {where.parent.parent} starts it from these "
            "weights)"
        )
    if saved.stream_version != STREAM_VERSION:
        raise UserError(
            f"{where} was trained on samples and masks of stream version {saved.stream_version}, "
            f"and this clue_ds draws those of version {STREAM_VERSION}; continue with the clue_ds "
            f"that saved it, or start a new run_dir from its weights: --model.init {where}"
        )
    saved_config = run_config.validate(saved.config, f"config of {where}")
    changed = differences(saved_config, identity.config, saved.step)
    if changed:
        raise UserError(
            f"{where} was saved by a run with other settings: {'; '.join(changed)}. Set them back "
            f"to continue it, {elsewhere}"
        )
    _check_same_shards(choice, ds_json.read(identity.config.deepspeed))


def _check_same_shards(choice: Choice, values: dict[str, Any]) -> None:
    """DeepSpeed's shards fit the number of ranks and the stage that wrote them."""
    saved, where = choice.manifest, choice.directory
    stage, offload = ds_json.zero_stage(values), ds_json.offloads(values)
    new_run = f"or start a new run_dir from its weights: --model.init {where}"
    if (saved.zero_stage, saved.offload) != (stage, offload):
        raise UserError(
            f"{where} was saved under ZeRO {_stage_name(saved.zero_stage, saved.offload)}, this "
            f"run has {_stage_name(stage, offload)}; set deepspeed back, {new_run}"
        )
    if stage and saved.world_size != dist.world_size():
        raise UserError(
            f"{where} was saved by {saved.world_size} ranks under ZeRO stage {stage}, this run has "
            f"{dist.world_size()}; start it with {saved.world_size} ranks, {new_run}"
        )


def _stage_name(stage: int, offload: bool) -> str:
    return f"stage {stage}" + (" with CPU offload" if offload else "")
