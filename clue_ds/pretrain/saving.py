"""Saving and loading a run: our checkpoint contains DeepSpeed's.

Guarantees: a published checkpoint is complete (checkpoint/manifest.py); saving either publishes a
new one or leaves the earlier ones unchanged; resuming with the same number of ranks, versions and
threads continues bit for bit, including dropout, and any other number of ranks or ZeRO stage
continues with the same weights and moments (checkpoint/regroup.py). Our own files are JSON, YAML
and safetensors. A full disk is one message on every rank, with the room that is there and the room
that is needed.

Rejected: DeepSpeed's `latest`, which is written before the last barrier, and not atomically.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from clue_ds import config as run_config
from clue_ds import dist, files
from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint import permissions, pickles, retention
from clue_ds.checkpoint.manifest import FROZEN, TAG, Choice, Manifest
from clue_ds.checkpoint.masters import OPTIMIZER_SHARDS
from clue_ds.config import CheckpointSection, RunConfig
from clue_ds.data.stream.samples import STREAM_VERSION
from clue_ds.errors import UserError, first_line
from clue_ds.job import preflight, run_lock
from clue_ds.pretrain import resume
from clue_ds.pretrain.engine import Engine, dropout_seed
from clue_ds.pretrain.resume import RunIdentity

# At the start there must be room for a checkpoint being written beside the one that it replaces,
# and a tenth more, because other files grow in the meantime.
CHECKPOINTS_AT_START = 2.2

# ---------------------------------------------------------------------------------------- saving


def save(
    engine: Engine,
    identity: RunIdentity,
    step: int,
    held_out_loss: float | None = None,
    texts: dict[str, str] | None = None,
) -> Path:
    """Publish the state after `step` updates and delete old ones; every rank must call it.

    `texts`: further small files of the checkpoint, name -> content.
    """
    folder = Path(identity.config.run_dir) / manifests.FOLDER
    final = folder / manifests.name(step)
    staging = final.with_name(final.name + ".tmp")
    num_bytes = checkpoint_bytes(engine)

    def attempt(work: Callable[[], None]) -> None:
        """Run `work` on this rank; an error in writing becomes the same UserError on all ranks."""
        error = None
        try:
            with _clear_write_errors(staging, num_bytes):
                work()
        except UserError as refusal:
            error = str(refusal)
        dist.agree(error)

    def check_lock() -> None:
        dist.agree(run_lock.lost(identity.config.run_dir) if dist.rank() == 0 else None)

    check_lock()
    attempt(lambda: _prepare(staging, num_bytes) if dist.rank() == 0 else None)
    # DeepSpeed's ranks wait for each other in here, so a rank that fails must not wait for them.
    with _clear_write_errors(staging, num_bytes):
        engine.save(staging, TAG)
    attempt(lambda: _write_own_files(staging, engine, identity, texts or {}))
    check_lock()
    if dist.rank() == 0:
        described = _describe(engine, identity, step, held_out_loss)
        attempt(lambda: _publish(staging, final, described, engine))
        for problem in _delete_old(folder, identity.config.checkpoint):
            print(f"warning: {problem}", flush=True)
    else:
        dist.agree(None)
    return final


def _prepare(staging: Path, num_bytes: int) -> None:
    """Make an empty staging directory; UserError when a checkpoint does not fit."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    message = no_room(staging, num_bytes)
    if message is not None:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(message)


def _write_own_files(
    staging: Path, engine: Engine, identity: RunIdentity, texts: dict[str, str]
) -> None:
    safetensors.torch.save_file(_random_state(), staging / _random_file(dist.rank()))
    if dist.rank() == 0:
        run_config.save(identity.config, staging / "config.yaml")
        shutil.copyfile(identity.vocab_file, staging / "vocab.txt")
        tokenizer = json.dumps({"do_lower_case": identity.lower_case})
        (staging / "tokenizer_config.json").write_text(tokenizer + "\n", encoding="utf-8")
        safetensors.torch.save_file(engine.frozen, staging / FROZEN)
        for name, text in texts.items():
            (staging / name).write_text(text, encoding="utf-8")


def _publish(staging: Path, final: Path, manifest: Manifest, engine: Engine) -> None:
    message = _missing_shards(staging, engine)
    if message is not None:
        raise UserError(message)
    manifests.publish(staging, final, manifest)


def _delete_old(folder: Path, section: CheckpointSection) -> list[str]:
    """Apply the config's retention; returns what went wrong, which does not end the run."""
    rule = retention.Rule(section.keep, section.keep_every, section.keep_best)
    problems = []
    try:
        problems += retention.delete_old(folder, rule)
        if section.keep_best:
            for directory in retention.best(manifests.published(folder)):
                files.write_text(folder / "best", directory.name + "\n")
    except OSError as error:
        problems.append(f"can't look after the old checkpoints in {folder}: {error}")
    return problems


def check_retention(config: RunConfig, has_held_out: bool) -> None:
    """UserError for a retention by which checkpoints would never be kept."""
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    if keep_every % every:
        raise UserError(
            f"checkpoint.keep_every {keep_every} is not a multiple of checkpoint.every {every}; "
            f"set it to {(keep_every // every + 1) * every}"
        )
    if not config.checkpoint.keep_best:
        return
    if not has_held_out:
        raise UserError(
            "checkpoint.keep_best needs held-out text; make the corpus with some (clue-ds shard "
            "--held-out), set data.held_out, or remove checkpoint.keep_best"
        )
    if every % config.evaluate.every:
        raise UserError(
            "checkpoint.keep_best needs a held-out loss for every checkpoint, but evaluate.every "
            f"{config.evaluate.every} does not divide checkpoint.every {every}; set evaluate.every "
            f"to {every}"
        )


def most_on_disk(config: RunConfig) -> int:
    """Largest number of complete checkpoints that this run ever has at once."""
    section = config.checkpoint
    # A new one is complete before the oldest is deleted.
    number = section.keep + 1 + section.keep_best
    return number + (config.train.steps // section.keep_every if section.keep_every else 0)


def checkpoint_bytes(engine: Engine) -> int:
    """About the size of a checkpoint, rather more than less."""
    # Weights, fp32 masters and two moments; everything else is small.
    return 16 * engine.num_parameters + (16 << 20)


def prepare_folder(run_dir: Path, engine: Engine) -> list[str]:
    """Make the folder of checkpoints and remove what dead processes left there; returns notes.

    UserError when the disk has too little room or does not keep owners and modes; the caller holds
    the run lock. That is checked here, rather than after the hours until the first checkpoint.
    """
    folder = run_dir / manifests.FOLDER
    num_bytes = checkpoint_bytes(engine)
    with _clear_write_errors(folder, num_bytes, remove=False):
        folder.mkdir(parents=True, exist_ok=True)
        removed = retention.remove_leftovers(folder)
        message = no_room_to_start(folder, num_bytes) or permissions.problem(folder)
    if message is not None:
        raise UserError(message)
    if removed:
        return [f"removed {', '.join(removed)}, which a run that died left in {folder}"]
    return []


def no_room_to_start(folder: Path, num_bytes: int) -> str | None:
    """The message when fewer than CHECKPOINTS_AT_START checkpoints fit; else None.

    Those that are there count as room: new ones replace them.
    """
    taken = sum(
        path.stat().st_size
        for directory in manifests.published(folder)
        for path in directory.rglob("*")
        if path.is_file()
    )
    free = shutil.disk_usage(folder).free
    needed = round(CHECKPOINTS_AT_START * num_bytes)
    if free + taken >= needed and free >= num_bytes:
        return None
    return (
        f"the disk of {folder} has {_gib(free)} free, and its checkpoints take {_gib(taken)}. A "
        f"checkpoint needs about {_gib(num_bytes)}, and a run needs room for "
        f"{CHECKPOINTS_AT_START} of them ({_gib(needed)}), because a new one is complete before "
        "the oldest is deleted. Free some space, or set another run_dir"
    )


def no_room(directory: Path, num_bytes: int) -> str | None:
    """The message when the disk of `directory` has less than `num_bytes` free; else None."""
    free = shutil.disk_usage(directory).free
    if free >= num_bytes:
        return None
    return (
        f"the disk of {directory} has {_gib(free)} free, but a checkpoint needs about "
        f"{_gib(num_bytes)}; the earlier checkpoints are untouched. Free some space (or lower "
        "checkpoint.keep) and start the same command again: it resumes"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


@contextlib.contextmanager
def _clear_write_errors(path: Path, num_bytes: int, remove: bool = True) -> Iterator[None]:
    """Turn write errors into one message for the user, and remove the half-written files."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch's zip writer reports a failed write as a RuntimeError that names the writer.
        if isinstance(error, RuntimeError) and not _failed_write(error):
            raise
        if remove and dist.rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        raise UserError(
            f"can't write the checkpoint {path}: {first_line(error)}; the earlier "
            f"checkpoints are untouched. The disk of {existing} has "
            f"{_gib(shutil.disk_usage(existing).free)} free, and a checkpoint needs about "
            f"{_gib(num_bytes)}; a quota of this user may allow less. Make room on that disk (or "
            "move run_dir) and start the same command again: it resumes"
        ) from error


def _failed_write(error: RuntimeError) -> bool:
    words = ("PytorchStreamWriter", "inline_container", "iostream", "write")
    return any(word in str(error) for word in words)


def _missing_shards(staging: Path, engine: Engine) -> str | None:
    """The message when rank 0 does not see a shard of every rank; None when it does."""
    expected = dist.world_size() if engine.stage else 0
    found = len(list((staging / TAG).glob(OPTIMIZER_SHARDS)))
    if found == expected:
        return None
    return (
        f"{staging} holds the shards of {found} ranks instead of {expected}; put run_dir on a disk "
        "that all machines of the run share"
    )


def _describe(
    engine: Engine, identity: RunIdentity, step: int, held_out_loss: float | None
) -> Manifest:
    return Manifest(
        format=manifests.FORMAT,
        step=step,
        samples=step * identity.config.train.global_batch_size,
        world_size=dist.world_size(),
        zero_stage=engine.stage,
        offload=engine.offload,
        precision=engine.precision,
        config=identity.config.model_dump(),
        model=dataclasses.asdict(identity.model),
        vocab_sha256=identity.vocab_sha256,
        corpus_fingerprint=identity.corpus_fingerprint,
        group_names=engine.group_names,
        versions=preflight.versions(),
        files={},
        stream_version=STREAM_VERSION,
        num_threads=torch.get_num_threads(),
        held_out_loss=held_out_loss,
    )


def _random_file(rank: int) -> str:
    return f"rng-rank{rank:05d}.safetensors"


def _random_state() -> dict[str, Tensor]:
    """State of the random generators that dropout uses on this rank."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


# -------------------------------------------------------------------------------------- resuming


def load(engine: Engine, choice: Choice) -> list[str]:
    """Load a checkpoint's weights, moments and generator states into a fresh engine.

    Returns a note for the user when the state was regrouped.
    """
    saved = choice.manifest
    num_bytes = engine.load(choice)
    if saved.world_size != dist.world_size():
        # Other ranks draw other dropout masks, but reproducible ones.
        torch.manual_seed(dropout_seed(int(saved.config["seed"]), saved.step))
    else:
        states = pickles.load_tensors(choice.directory / _random_file(dist.rank()))
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    return resume.regrouped(saved, engine.stage, engine.offload, num_bytes)
