"""The layout of checkpoint directories, their manifest, and the choice of an intact one.

    checkpoints/
      step-00000200/          published: complete; manifest.json lists every file
        manifest.json         sizes and SHA-256 of all others; shapes, versions, samples consumed
        config.yaml vocab.txt tokenizer_config.json frozen.safetensors rng-rank00000.safetensors
        deepspeed/            DeepSpeed's own shards
      step-00000300.tmp/      being written, or left behind by a run that died
      latest                  name of the newest one, for people and tools; not used here

Guarantees: a directory is published by one rename, after its files and its manifest are on disk;
`newest` returns a directory in which every byte was read and compared, and why it skipped each
newer one. Nothing is unpickled here.

Rejected: using `latest` (after a crash it may be out of date) and comparing only sizes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clue_ds import files
from clue_ds.errors import UserError

FORMAT = 1
FILE = "manifest.json"
FOLDER = "checkpoints"
# Inside a checkpoint: DeepSpeed's folder, and the parameters that are not trained.
TAG = "deepspeed"
FROZEN = "frozen.safetensors"
STEP_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `samples`: sequences consumed; `group_names`: see Engine.

    `stream_version`: STREAM_VERSION of data/stream/samples.py; 0: saved before it existed.
    """

    format: int
    step: int
    samples: int
    world_size: int
    zero_stage: int
    offload: bool
    precision: str
    config: dict[str, Any]
    model: dict[str, Any]
    vocab_sha256: str
    corpus_fingerprint: str
    group_names: list[list[str]]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    stream_version: int = 0


@dataclass(frozen=True)
class Choice:
    """A verified checkpoint, and why each newer directory was skipped."""

    directory: Path
    manifest: Manifest
    skipped: dict[Path, str]


class Damaged(Exception):
    """A directory is not an intact checkpoint; the message is the reason."""


def name(step: int) -> str:
    """Directory name of the checkpoint after `step` updates."""
    return f"step-{step:08d}"


def publish(staging: Path, final: Path, manifest: Manifest) -> None:
    """Hash and sync every file of `staging`, write its manifest, and rename it to `final`."""
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    contents = {}
    for path in paths:
        files.sync(path)
        key = path.relative_to(staging).as_posix()
        contents[key] = {"size": path.stat().st_size, "sha256": files.sha256(path)}
    complete = dataclasses.replace(manifest, files=contents)
    files.write_json(staging / FILE, dataclasses.asdict(complete))
    for folder in {path.parent for path in paths} | {staging}:
        files.sync(folder)
    staging.rename(final)
    files.write_text(final.parent / "latest", final.name + "\n")


def delete_old(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest published checkpoints."""
    for directory in published(folder)[keep:]:
        # Renamed first, because a half-deleted directory must not look published.
        doomed = directory.rename(directory.with_name(directory.name + ".tmp"))
        shutil.rmtree(doomed)


def published(folder: Path) -> list[Path]:
    """Directories named step-NNNNNNNN, newest first, without checking whether they are intact."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if STEP_NAME.fullmatch(p.name)), reverse=True)


def verify(directory: Path) -> Manifest:
    """The manifest, after reading and comparing every file; raises Damaged with the reason."""
    path = directory / FILE
    if not path.is_file():
        raise Damaged(f"{FILE} is missing: the checkpoint was not completely written")
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Damaged(f"{FILE} can't be read: {error}") from None
    if manifest.format != FORMAT:
        raise Damaged(f"{FILE} has format {manifest.format}; this version reads {FORMAT}")
    for key, expected in manifest.files.items():
        _compare(directory / key, key, expected)
    return manifest


def _compare(path: Path, key: str, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise Damaged(f"{key} is missing")
    status = path.stat()
    if status.st_size != expected["size"]:
        raise Damaged(f"{key} has {status.st_size:,} bytes instead of {expected['size']:,}")
    # DeepSpeed's shards are pickles: their owner could run code as this user.
    if status.st_uid not in (os.getuid(), 0):
        raise Damaged(
            f"{key} belongs to user {status.st_uid}, and loading it would run that user's code; "
            "if you trust it, make your own copy of the checkpoint"
        )
    if files.sha256(path) != expected["sha256"]:
        raise Damaged(f"{key} has other bytes than when it was saved (SHA-256 differs)")


def newest(run_dir: str | Path) -> Choice | None:
    """The newest checkpoint of a run that verifies; None when the run has none at all.

    UserError when there are directories but all are damaged: the run must not start over silently.
    """
    folder = Path(run_dir) / FOLDER
    skipped: dict[Path, str] = {}
    for directory in published(folder):
        try:
            return Choice(directory, verify(directory), skipped)
        except Damaged as error:
            skipped[directory] = str(error)
    if not skipped:
        return None
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped.items())
    raise UserError(
        f"no checkpoint in {folder} is intact ({reasons}); restore one from a copy, or move "
        f"{folder} away to start this run again"
    )
