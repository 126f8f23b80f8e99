"""Which checkpoints of a run stay on disk, and removing the others.

Guarantees: the `keep` newest stay, so does every one whose step is a multiple of `keep_every`, and
with `keep_best` the one with the lowest held-out loss; the newest is never deleted. A process that
dies while it deletes or saves leaves step-NNNNNNNN.tmp, which the next start of the run removes. A
damaged checkpoint (step-NNNNNNNN.damaged) stays until the `keep` newest are all of later steps.
Names that this project doesn't give are left alone.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from clue_ds import files
from clue_ds.checkpoint import manifest as manifests
from clue_ds.config import RunConfig
from clue_ds.errors import UserError

LEFTOVER = re.compile(r"step-\d{8}\.tmp")
DAMAGED = re.compile(r"step-(\d{8})\.damaged")


@dataclass(frozen=True)
class Rule:
    """Which checkpoints stay. `every`: 0 for none beside the newest."""

    newest: int
    every: int = 0
    best: bool = False


def check(config: RunConfig, has_held_out: bool) -> None:
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


def look_after(folder: Path, rule: Rule) -> list[str]:
    """Delete what the rule does not keep, and name the best in `best`; returns what went wrong."""
    problems = []
    try:
        problems += delete_old(folder, rule)
        problems += delete_damaged(folder, rule.newest)
        if rule.best:
            for directory in best(manifests.published(folder)):
                files.write_text(folder / "best", directory.name + "\n")
    except OSError as error:
        problems.append(f"can't look after the old checkpoints in {folder}: {error}")
    return problems


def delete_old(folder: Path, rule: Rule) -> list[str]:
    """Delete the published checkpoints that the rule does not keep.

    Returns a message for each one that could not be deleted; the run goes on without it.
    """
    found = manifests.published(folder)
    kept = set(found[: rule.newest])
    if rule.every:
        kept |= {path for path in found if manifests.step_of(path) % rule.every == 0}
    if rule.best:
        kept |= best(found)
    failures = []
    for directory in found:
        if directory in kept:
            continue
        try:
            # Renamed first, because a half-deleted directory must not look published.
            doomed = directory.with_name(directory.name + ".tmp")
            if doomed.exists():
                shutil.rmtree(doomed)
            shutil.rmtree(directory.rename(doomed))
        except OSError as error:
            failures.append(
                f"can't delete the old checkpoint {directory}: {error}; it takes up room until "
                "you delete it, and the run goes on"
            )
    return failures


def set_aside(directory: Path) -> None:
    """Rename a damaged checkpoint, so that the run can save this step again."""
    aside = directory.with_name(directory.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    directory.rename(aside)


def delete_damaged(folder: Path, num_newer: int) -> list[str]:
    """Delete the damaged checkpoints after which `num_newer` others have been published.

    Until then they are there for whoever looks for the cause, or can restore the file that is
    damaged. Returns a message for each one that could not be deleted.
    """
    newest = manifests.published(folder)[:num_newer]
    if len(newest) < num_newer:
        return []
    oldest_step, failures = manifests.step_of(newest[-1]), []
    for path in sorted(folder.iterdir()):
        match = DAMAGED.fullmatch(path.name)
        if match is None or path.is_symlink() or int(match[1]) >= oldest_step:
            continue
        try:
            shutil.rmtree(path)
        except OSError as error:
            failures.append(
                f"can't delete the damaged checkpoint {path}: {error}; it takes up room until you "
                "delete it, and the run goes on"
            )
    return failures


def best(directories: list[Path]) -> set[Path]:
    """The checkpoint with the lowest held-out loss, the newest of equals; none without a loss."""
    losses = {}
    for directory in directories:
        try:
            loss = manifests.read(directory).held_out_loss
        except (manifests.Damaged, UserError):
            continue
        if loss is not None:
            losses[directory] = loss
    # `directories` is sorted from the newest on, and min returns the first of equals.
    return {min(losses, key=losses.__getitem__)} if losses else set()


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what dead processes of this run left behind; returns the names.

    The caller holds the run lock, so nobody is writing there.
    """
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if LEFTOVER.fullmatch(p.name) and not p.is_symlink()]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return sorted(path.name for path in found if not path.exists())
