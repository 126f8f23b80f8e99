"""Saving and loading a run: our checkpoint contains DeepSpeed's.

Guarantees: a published checkpoint is complete (checkpoint/manifest.py); saving either publishes a
new one or leaves the earlier ones unchanged; resuming with the same number of ranks continues bit
for bit, including dropout. Our own files are JSON, YAML and safetensors.

Rejected: DeepSpeed's `latest`, which is written before the last barrier, and not atomically.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from clue_ds import config as run_config
from clue_ds import dist
from clue_ds.checkpoint import manifest as manifests
from clue_ds.checkpoint.manifest import FROZEN, TAG, Choice, Manifest
from clue_ds.checkpoint.masters import OPTIMIZER_SHARDS
from clue_ds.data.stream.samples import STREAM_VERSION
from clue_ds.errors import UserError
from clue_ds.job import preflight, run_lock
from clue_ds.pretrain.engine import Engine, dropout_seed
from clue_ds.pretrain.resume import RunIdentity

# ---------------------------------------------------------------------------------------- saving


def save(engine: Engine, identity: RunIdentity, step: int) -> Path:
    """Publish the state after `step` updates and delete the oldest; every rank must call it."""
    folder = Path(identity.config.run_dir) / manifests.FOLDER
    final = folder / manifests.name(step)
    staging = final.with_name(final.name + ".tmp")
    run_dir = identity.config.run_dir
    dist.agree(run_lock.lost(run_dir) or _prepare(staging, engine) if dist.rank() == 0 else None)
    with _clear_write_errors(staging):
        engine.save(staging, TAG)
        safetensors.torch.save_file(_random_state(), staging / _random_file(dist.rank()))
        if dist.rank() == 0:
            run_config.save(identity.config, staging / "config.yaml")
            shutil.copyfile(identity.vocab_file, staging / "vocab.txt")
            tokenizer = json.dumps({"do_lower_case": identity.lower_case})
            (staging / "tokenizer_config.json").write_text(tokenizer + "\n", encoding="utf-8")
            safetensors.torch.save_file(engine.frozen, staging / FROZEN)
    dist.barrier()
    error = None
    if dist.rank() == 0:
        error = run_lock.lost(run_dir) or _missing_shards(staging, engine)
        with _clear_write_errors(staging):
            if error is None:
                manifests.publish(staging, final, _describe(engine, identity, step))
                manifests.delete_old(folder, identity.config.checkpoint.keep)
    dist.agree(error)
    return final


def _prepare(staging: Path, engine: Engine) -> str | None:
    """Make an empty staging directory; returns the message when a checkpoint does not fit."""
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return no_room_for(engine, staging)


def no_room_for(engine: Engine, directory: Path) -> str | None:
    """The message when a checkpoint of `engine` does not fit on the disk of `directory`."""
    # Weights, fp32 masters and two moments; everything else is small.
    return no_room(directory, num_bytes=16 * engine.num_parameters + (16 << 20))


def no_room(directory: Path, num_bytes: int) -> str | None:
    """The message when the disk of `directory` has less than `num_bytes` free; else None."""
    free = shutil.disk_usage(directory).free
    if free >= num_bytes:
        return None
    return (
        f"the disk of {directory} has {free / 2**30:.2f} GiB free, but a checkpoint needs about "
        f"{num_bytes / 2**30:.2f} GiB; the earlier checkpoints are untouched. Free some space (or "
        "lower checkpoint.keep) and start the same command again: it resumes"
    )


@contextlib.contextmanager
def _clear_write_errors(staging: Path) -> Iterator[None]:
    """Turn write errors into one message for the user, and remove the half-written files."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch's zip writer reports a failed write as a RuntimeError that names the writer.
        if isinstance(error, RuntimeError) and not _failed_write(error):
            raise
        if dist.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise UserError(
            f"can't write the checkpoint {staging}: {str(error).splitlines()[0]}; the earlier "
            "checkpoints are untouched. Make room on that disk (or move run_dir) and start the "
            "same command again: it resumes"
        ) from error


def _failed_write(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "write"))


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


def _describe(engine: Engine, identity: RunIdentity, step: int) -> Manifest:
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


def load(engine: Engine, choice: Choice) -> None:
    """Load a checkpoint's weights, moments and generator states into a fresh engine."""
    engine.load(choice.directory, TAG)
    engine.frozen = safetensors.torch.load_file(choice.directory / FROZEN)
    if choice.manifest.world_size != dist.world_size():
        # Stage 0 with another number of ranks: other dropout masks, but reproducible.
        torch.manual_seed(dropout_seed(int(choice.manifest.config["seed"]), choice.manifest.step))
        return
    states = safetensors.torch.load_file(choice.directory / _random_file(dist.rank()))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
