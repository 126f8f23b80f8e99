"""How a checkpoint gets onto the disk and is found intact: its directory and its manifest.

    checkpoints/
      step-00000200/          published: complete; manifest.json lists every file
        manifest.json         sizes and SHA-256 of all others; shapes, versions, samples consumed
        config.yaml vocab.txt tokenizer_config.json frozen.safetensors rng-rank00000.safetensors
        deepspeed/            DeepSpeed's own shards
      step-00000300.tmp/      being written, or left behind by a run that died
      latest                  name of the newest one, for people and tools; not used here

The states of fine-tuning are directories of this kind, too; they have other files and a manifest
with fewer entries (tasks/finetune/state.py).

Guarantees: a directory is published by one rename, after its files and its manifest are on disk;
`newest` returns a directory in which every byte was read and compared, the manifest included, and
says why it skipped each newer one. A checkpoint that others could have changed, or that a newer
clue_ds made, is an error and is neither skipped nor renamed. Nothing is unpickled here.

Formats: 1 had no hash of its own. 2 has `sha256`: the SHA-256 of the file's bytes as they are when
that field is "". The bytes are exactly those of `seal`, so an edited manifest never passes. A
clue_ds that reads only format 1 takes format 2 for damaged and does not load it.

Rejected: using `latest` (after a crash it may be out of date) and comparing only sizes; adding the
hash to format 1, where a damaged name of that field would make an unhashed manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from clue_ds import files
from clue_ds.checkpoint import permissions
from clue_ds.errors import UserError
from clue_ds.settings import phases

FORMAT = 2
FILE = "manifest.json"
FOLDER = "checkpoints"
# Inside a checkpoint: DeepSpeed's folder, and the parameters that are not trained.
TAG = "deepspeed"
FROZEN = "frozen.safetensors"
STEP_NAME = re.compile(r"step-(\d{8})")

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class FileRecord:
    """What a file of the checkpoint must be: its size in bytes and its SHA-256."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    size: Count
    sha256: Digest


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What every manifest.json says. `sha256`: see the header; only `publish` sets it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    format: Positive
    step: Positive
    versions: dict[str, str]
    files: dict[str, FileRecord]
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest(Entries):
    """manifest.json of a pretraining run. `samples`: sequences consumed; `group_names`: see Engine.

    `stream_version`: STREAM_VERSION of data/stream/samples.py; 0: saved before it existed.
    `num_threads`: of torch on rank 0; 0: not recorded. `held_out_loss`: if it was evaluated at this
    step.
    """

    samples: Positive
    world_size: Positive
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    offload: bool
    precision: str
    config: dict[str, Any]
    model: dict[str, Any]
    vocab_sha256: str
    corpus_fingerprint: str
    group_names: list[list[str]]
    stream_version: Count = 0
    num_threads: Count = 0
    held_out_loss: float | None = None


_ADAPTER = TypeAdapter(Manifest)
M = TypeVar("M", bound=Entries)


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


def step_of(directory: Path) -> int:
    """The step in the name of a published checkpoint."""
    match = STEP_NAME.fullmatch(directory.name)
    assert match is not None, directory
    return int(match[1])


def record(directory: Path, paths: list[Path]) -> dict[str, FileRecord]:
    """Close files to others, have them on disk, and hash them: what the manifest says of them.

    Each rank does this for the files that it wrote, before rank 0 publishes.
    """
    records = {}
    for path in paths:
        permissions.close_to_others(path)
        files.sync(path)
        key = path.relative_to(directory).as_posix()
        records[key] = FileRecord(path.stat().st_size, files.sha256(path))
    return records


def publish(staging: Path, final: Path, manifest: M) -> M:
    """Write the manifest of `staging` and rename it to `final`; returns it, all files included.

    `manifest.files` are on disk; all other files in `staging` are recorded here.
    """
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    others = [p for p in paths if p.relative_to(staging).as_posix() not in manifest.files]
    contents = manifest.files | record(staging, others)
    complete = dataclasses.replace(manifest, files=dict(sorted(contents.items())))
    files.write_text(staging / FILE, seal(dataclasses.asdict(complete)))
    permissions.close_to_others(staging / FILE)
    for folder in {path.parent for path in paths} | {staging}:
        permissions.close_to_others(folder)
        files.sync(folder)
    staging.rename(final)
    files.sync(final.parent)
    try:
        files.write_text(final.parent / "latest", final.name + "\n")
    except OSError as error:  # the checkpoint is on disk, and nothing here reads `latest`
        print(f"warning: can't write {final.parent / 'latest'}: {error}", flush=True)
    return complete


def unseen(staging: Path, records: dict[str, FileRecord]) -> str | None:
    """The first file that this process does not see as other ranks wrote it; None if it sees all.

    Opens each: a network disk then asks its server, where a plain stat may answer from a cache.
    """
    for key, expected in records.items():
        try:
            with open(staging / key, "rb") as file:
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return key
        if size != expected.size:
            return key
    return None


def seal(values: dict[str, Any]) -> str:
    """The text of manifest.json, with its own hash in `sha256`."""
    unsealed = {**values, "sha256": ""}
    digest = hashlib.sha256(_text(unsealed).encode("utf-8")).hexdigest()
    return _text({**unsealed, "sha256": digest})


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def published(folder: Path) -> list[Path]:
    """Directories named step-NNNNNNNN, newest first, without checking whether they are intact."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if STEP_NAME.fullmatch(p.name)), reverse=True)


def read(directory: Path) -> Manifest:
    """The manifest, its own hash and every value checked, without reading the other files.

    Damaged with the reason; UserError when a newer clue_ds made it.
    """
    manifest = read_entries(directory, _ADAPTER, FORMAT)
    try:
        samples = phases.num_samples(manifest.config, manifest.step)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        samples = -1
    if manifest.samples != samples:
        raise Damaged(
            f"{FILE} says {manifest.samples} samples after step {manifest.step}, which is not what "
            "the batch sizes in its config give"
        )
    return manifest


def read_entries(directory: Path, adapter: TypeAdapter[M], newest_format: int) -> M:
    """As `read`, for the entries of any kind of run; those of `newest_format` have a hash."""
    text, values = _parse(directory / FILE)
    number = values.get("format")
    if type(number) is int and number > newest_format:
        raise UserError(_newer(directory, values, newest_format))
    if number == newest_format or "sha256" in values:
        _check_seal(text, values)
    try:
        manifest = adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise Damaged(f"{FILE} is wrong at {key}: {first['msg']}") from None
    if STEP_NAME.fullmatch(directory.name) and step_of(directory) != manifest.step:
        raise Damaged(f"{FILE} says step {manifest.step}, which is not the directory's name")
    return manifest


def _parse(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8")
        values = json.loads(text)
    except FileNotFoundError:
        reason = f"{FILE} is missing: the checkpoint was not completely written"
        raise Damaged(reason) from None
    except PermissionError:
        raise UserError(f"this user may not read {path}; change its permissions") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{FILE} can't be read: {error}") from None
    if not isinstance(values, dict):
        raise Damaged(f"{FILE} holds no JSON object")
    return text, values


def _check_seal(text: str, values: dict[str, Any]) -> None:
    try:
        is_intact = seal(values) == text
    except (ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        raise Damaged(f"{FILE} has other bytes than when it was saved (its own SHA-256 differs)")


def _newer(directory: Path, values: dict[str, Any], newest_format: int) -> str:
    versions = values.get("versions")
    made_by = versions.get("clue_ds", "") if isinstance(versions, dict) else ""
    return (
        f"{directory} was made by a newer clue_ds{f' ({made_by})' if made_by else ''}: its {FILE} "
        f"has format {values['format']}, and this version reads up to {newest_format}. "
        "Install that version to use it, or give the run another directory. Nothing was changed"
    )


def verify(directory: Path) -> Manifest:
    """The manifest, after reading and comparing every file; raises Damaged with the reason.

    UserError when others could have changed the checkpoint, or a newer clue_ds made it.
    """
    return verify_files(directory, read)


def verify_files(directory: Path, reader: Callable[[Path], M]) -> M:
    """As `verify`, for a manifest that `reader` reads."""
    permissions.check(directory)
    manifest = reader(directory)
    for key, expected in manifest.files.items():
        _compare(directory, key, expected)
    for path in (directory / TAG).rglob("*"):
        key = path.relative_to(directory).as_posix()
        if path.is_file() and key not in manifest.files and not path.name.startswith("."):
            raise Damaged(f"{key} is not in {FILE}, so it was not there when it was saved")
    return manifest


def _compare(directory: Path, key: str, expected: FileRecord) -> None:
    path = directory / key
    if ".." in Path(key).parts or Path(key).is_absolute():
        raise Damaged(f"{FILE} lists {key}, which is outside the checkpoint")
    if not path.is_file():
        raise Damaged(f"{key} is missing")
    permissions.check_one(path, directory)
    size = path.stat().st_size
    if size != expected.size:
        raise Damaged(f"{key} has {size:,} bytes instead of {expected.size:,}")
    try:
        digest = files.sha256(path)
    except PermissionError:
        raise UserError(f"this user may not read {path}; change its permissions") from None
    except OSError as error:
        raise Damaged(f"{key} can't be read: {error}") from None
    if digest != expected.sha256:
        raise Damaged(f"{key} has other bytes than when it was saved (SHA-256 differs)")


def newest(run_dir: str | Path) -> Choice | None:
    """The newest checkpoint of a run that verifies; None when the run has none at all.

    UserError when there are directories but all are damaged: the run must not start over silently;
    also when one that is not older may not be used at all (see `verify`).
    """
    folder = Path(run_dir) / FOLDER
    found, skipped = first_intact(folder, verify)
    if found is not None:
        return Choice(*found, skipped)
    if not skipped:
        return None
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in skipped.items())
    raise UserError(
        f"no checkpoint in {folder} is intact ({reasons}); restore one from a copy, or move "
        f"{folder} away to start this run again"
    )


def first_intact(
    folder: Path, verifier: Callable[[Path], M]
) -> tuple[tuple[Path, M] | None, dict[Path, str]]:
    """(the newest directory in which `verifier` finds no damage, why each newer one was skipped)"""
    skipped: dict[Path, str] = {}
    for directory in published(folder):
        try:
            return (directory, verifier(directory)), skipped
        except Damaged as error:
            skipped[directory] = str(error)
    return None, skipped
