"""Which checkpoint a run continues from, and whether it is still the same run.

Guarantees: the newest intact checkpoint is chosen; damaged ones are named and moved aside; one that
others could have changed, or that a newer clue_ds made, ends the start and stays as it is; changed
settings that would make it a different run are refused in one error that lists every difference,
before any rank has unpickled anything; other versions or threads, which change bits, are one note,
and so is another number of ranks or another ZeRO stage, whose state is regrouped.

With the schedules linear and cosine the learning rate of every earlier step depends on train.steps,
so it may be raised only with `extend`: the run then goes on with the learning rates of the longer
schedule, which are higher, and is another run than one of that length from the beginning. With wsd
it may change without that, as long as neither the old nor the new decay has begun.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
from pathlib import Path

import torch

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import retention
from clue_ds.checkpoint.manifest import Choice, Manifest
from clue_ds.config import RunConfig
from clue_ds.data.stream.samples import STREAM_VERSION
from clue_ds.errors import UserError
from clue_ds.job import preflight
from clue_ds.presets import ModelConfig
from clue_ds.pretrain.schedule import learning_rate
from clue_ds.settings.phases import KEYS, at, parts

# What may differ between the run that saved and the run that resumes: paths, how often something is
# written, and how the same arithmetic is carried out.
MAY_CHANGE = {
    "run_dir",
    "extend",
    "deepspeed",  # another stage or offload is regrouped by Engine.load
    "data.corpus",  # compared by its fingerprint
    "data.mixture",  # part of that fingerprint, with its shares
    "data.padding",  # the same rows, and the same update up to the order of its sums
    "train.micro_batch_size",
    "train.cuda_graph",
    "train.on_nan",
    "train.max_skipped_steps",
    "train.on_spike",
    "train.spike_window",
    "train.spike_zscore",
    "train.rollback_steps",
    "train.rollback_batches",
    "train.max_rollbacks",
    "train.profile",
    "data.held_out",
    "data.pairs",  # compared by the fingerprint of their content
    "evaluate.every",
    "evaluate.batches",
    "model.attention",
    "model.kernels",
    "model.compile",
    "model.init",  # matters only at the start of a run
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "checkpoint.async_save",
    "log.every",
    "log.seconds",
    "log.tensorboard",
    "log.trackers",
    *(f"health.{name}" for name in run_config.HealthSection.model_fields),
}


# Compared for the steps that were made: what comes in later ones may change.
BY_PHASE = {"phases", *KEYS}

# How long a run is; the learning rates of its schedule follow from these.
LENGTH = ("train.steps ", "train.decay_steps ")


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What identifies a run; a checkpoint stores it beside weights and step.

    `corpora`: (begin, fingerprint) of each corpus or mixture that the run reads, in order.
    """

    config: RunConfig
    model: ModelConfig
    vocab_file: Path
    vocab_sha256: str
    lower_case: bool
    corpora: tuple[tuple[int, str], ...]

    def corpus_fingerprint(self, step: int) -> str:
        """Of what the first `step` steps are trained on: a corpus's own, if it is only one."""
        read = [(begin, fingerprint) for begin, fingerprint in self.corpora if begin < step]
        if len(read) < 2:
            return self.corpora[0][1]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def choose(identity: RunIdentity, sets_aside: bool = True) -> Choice | None:
    """The checkpoint that this run continues from; None when it starts from the beginning.

    Rank 0 reads and compares the files, and all ranks get its answer. With `sets_aside` damaged
    directories are renamed to step-N.damaged. UserError when the newest checkpoint belongs to a
    different run.
    """
    choice, error = None, None
    if dist.rank() == 0:
        try:
            choice = manifests.newest(identity.config.run_dir)
            if choice is not None:
                _check_same_run(choice, identity)
                for directory in choice.skipped if sets_aside else ():
                    retention.set_aside(directory)
        except UserError as refusal:
            error = str(refusal)
    dist.agree(error)
    return dist.broadcast(choice)


def describe(choice: Choice) -> list[str]:
    """Notes for the user: which checkpoint was chosen, and why not a newer one."""
    skipped = [
        f"skipped {directory.name} (renamed to {directory.name}.damaged, which is deleted when "
        f"checkpoint.keep newer ones have been saved): {reason}"
        for directory, reason in choice.skipped.items()
    ]
    chosen = f"resuming after step {choice.manifest.step}: the newest intact checkpoint is"
    return [*skipped, f"{chosen} {choice.directory}"]


def environment(saved: Manifest, uses_cpu: bool) -> list[str]:
    """A note when the run can't continue bit for bit because versions or threads are others.

    `uses_cpu`: whether the number of threads decides the order of any sums.
    """
    now = preflight.versions()
    before = [
        (f"{package} {saved.versions[package]}", f"{package} {now[package]}")
        for package in ("torch", "deepspeed")
        if saved.versions.get(package, now[package]) != now[package]
    ]
    num_threads = torch.get_num_threads()
    if uses_cpu and saved.num_threads and saved.num_threads != num_threads:
        before.append((f"{saved.num_threads} threads", f"{num_threads} threads"))
    if not before:
        return []
    then, today = (" and ".join(names) for names in zip(*before, strict=True))
    return [
        f"the checkpoint was saved with {then}, and this run has {today}: it continues, but its "
        "losses and weights won't be those of an undisturbed run bit for bit"
    ]


def regrouped(saved: Manifest, stage: int, offload: bool, num_bytes: int | None) -> list[str]:
    """A note when other ranks, or another stage, carry the run on than those that saved it.

    `num_bytes`: what this rank read into another layout; None when the layout is the same.
    """
    world_size = dist.world_size()
    before = (saved.world_size, _stage_name(saved.zero_stage, saved.offload))
    now = (world_size, _stage_name(stage, offload))
    if num_bytes is None and before == now:
        return []
    was, will_be = (f"{_ranks(number)} under ZeRO {name}" for number, name in (before, now))
    read = "" if num_bytes is None else f" ({num_bytes / 2**20:,.1f} MiB on rank 0)"
    note = (
        f"the checkpoint was saved by {was}, and {will_be} continue it: weights, moments{read}, "
        "samples and masks are the same"
    )
    if saved.world_size != world_size:
        note += "; dropout draws other masks from here on"
    return [note]


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"


def differences(saved: RunConfig, now: RunConfig, step: int) -> list[str]:
    """Changed settings with which the continued run would be a different run."""
    changed = []
    flat_now = dict(run_config.flatten(now.model_dump(), MAY_CHANGE))
    for key, old in run_config.flatten(saved.model_dump(), MAY_CHANGE):
        new = flat_now[key]
        if key == "train.precision" and new == "auto":
            continue  # the run goes on in the precision of the checkpoint
        if old != new and key not in MAY_CHANGE and key not in BY_PHASE:
            changed.append(f"{key} was {old!r}, is now {new!r}")
    changed += _changes_of_the_past(saved, now, step)
    # With warm-up, stable, decay no earlier step depends on the end, until the decay begins.
    if saved.train.schedule == now.train.schedule == "wsd":
        began = [c.train.steps - c.train.decay_steps for c in (saved, now)]
        if step <= min(began):
            changed = [line for line in changed if not line.startswith(LENGTH)]
    if now.extend and now.train.steps > saved.train.steps:
        changed = [line for line in changed if not line.startswith(LENGTH)]
    return changed


def _changes_of_the_past(saved: RunConfig, now: RunConfig, step: int) -> list[str]:
    """Settings that a phase may have for itself, and that were others in a step up to `step`."""
    before, after = (parts(config.model_dump()) for config in (saved, now))
    begins = sorted({part.begin for part in (*before, *after) if part.begin < step})
    changed = []
    for key in (key for key in KEYS if key not in MAY_CHANGE):
        pairs = [(at(before, n).settings[key], at(after, n).settings[key], n) for n in begins]
        different = next((pair for pair in pairs if pair[0] != pair[1]), None)
        if different is not None:
            old, new, begin = different
            where = f" in step {begin + 1}" if len(begins) > 1 else ""
            changed.append(f"{key} was {old!r}, is now {new!r}{where}")
    return changed


def extension(choice: Choice, now: RunConfig) -> list[str]:
    """A note on what happens to the learning rate when train.steps is another than before."""
    step, saved = choice.manifest.step, run_config.validate(choice.manifest.config, "checkpoint")
    if saved.train.steps == now.train.steps or step >= now.train.steps:
        return []
    rate = learning_rate(now.train, step)
    before = learning_rate(saved.train, min(step, saved.train.steps - 1))
    same = math.isclose(rate, before, rel_tol=1e-9)
    return [
        f"train.steps was {saved.train.steps:,}, is now {now.train.steps:,}: the learning rate "
        + (f"goes on at {rate:.3g}" if same else f"goes from {before:.3g} to {rate:.3g}")
        + f" and follows the schedule {now.train.schedule} of the new length"
    ]


def _check_same_run(choice: Choice, identity: RunIdentity) -> None:
    saved, where = choice.manifest, choice.directory
    elsewhere = "or give another run_dir to start a new run"
    if saved.vocab_sha256 != identity.vocab_sha256:
        raise UserError(
            f"{where} was trained with another vocabulary than the corpus "
            f"{identity.config.data.corpus} has; give the corpus of that run, {elsewhere}"
        )
    if saved.corpus_fingerprint != identity.corpus_fingerprint(saved.step):
        mixture = ", or its mixture in the steps before," if len(identity.corpora) > 1 else ""
        raise UserError(
            f"the corpus {identity.config.data.corpus}{mixture} has changed since {where} was "
            f"saved; restore it, {elsewhere} (model.init {where.parent.parent} starts it from "
            "these weights)"
        )
    if saved.stream_version != STREAM_VERSION:
        raise UserError(
            f"{where} was trained on samples and masks of stream version {saved.stream_version}, "
            f"but this clue_ds makes those of version {STREAM_VERSION}; continue with the clue_ds "
            "that saved it, or start a new run_dir from its weights: "
            f"--model.init {shlex.quote(str(where))}"
        )
    saved_config = run_config.validate(saved.config, f"config of {where}")
    changed = differences(saved_config, identity.config, saved.step)
    if changed:
        longer = identity.config.train.steps > saved_config.train.steps
        hint = (
            ". With --extend the run goes on to the new train.steps, with the learning rates of "
            "the longer schedule from this step on"
            if longer and any(line.startswith(LENGTH) for line in changed)
            else ""
        )
        raise UserError(
            f"{where} was saved by a run with other settings: {'; '.join(changed)}. Set them back "
            f"to continue it, {elsewhere}{hint}"
        )


def _stage_name(stage: int, offload: bool) -> str:
    return f"stage {stage}" + (" with CPU offload" if offload else "")
