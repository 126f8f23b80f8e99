"""`clue-ds status RUN`: the progress of a run, read from its files on any machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import tyro

from clue_ds import config as run_config
from clue_ds.checkpoint import manifest
from clue_ds.errors import UserError
from clue_ds.job import run_lock
from clue_ds.metrics import format_seconds, parse_line

# Keys of a log line that `describe` uses.
SHOWN = {"step", "seconds_per_step", "mfu", "tokens_per_second", "loss"}


def status(run: tyro.conf.Positional[Path]) -> None:
    """Show the progress of a run: step, speed, time left, newest checkpoint, and if it is running.

    Args:
        run: the run's directory
    """
    print("\n".join(describe(run)))


def describe(run: Path) -> list[str]:
    """One fact per line."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not a run: it has no config.yaml; give the run_dir of a pretraining run"
        )
    config = run_config.load(run / "config.yaml")
    line = _last_line(run / "log.jsonl")
    step = 0 if line is None else line["step"]
    steps = config.train.steps
    lines = [f"{run}: step {step:,} of {steps:,} ({step / steps:.1%})"]
    if line is not None:
        left = (steps - step) * line["seconds_per_step"]
        mfu = "" if line["mfu"] is None else f", MFU {line['mfu']:.1%}"
        lines.append(
            f"speed       {line['tokens_per_second']:,.0f} tokens/s, "
            f"{line['seconds_per_step']:.3f} s per step{mfu}; loss {line['loss']:.4f}"
        )
        lines.append(f"time left   {format_seconds(left)}" if left else "time left   none: done")
    newest = manifest.published(run / manifest.FOLDER)
    lines.append(f"checkpoint  {newest[0].name if newest else 'none yet'}")
    lines.append(f"alive       {_alive(run, step >= steps)}")
    return lines


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last complete line; one that is still being written is ignored."""
    if not path.is_file():
        return None
    for text in reversed(path.read_bytes().splitlines()):
        line = parse_line(text)
        if line is not None and SHOWN <= line.keys():
            return line
    return None


def _alive(run: Path, is_done: bool) -> str:
    sign = run_lock.read(run / run_lock.FILE)
    if sign is None or sign.peer is None:
        return "no, it is done" if is_done else "no; to continue, start the same pretrain command"
    where = f"process {sign.peer.pid} on {sign.peer.host}"
    if sign.is_on_this_machine():
        if sign.state() == "stopped":
            return f"yes, but stopped (to continue: kill -CONT {sign.peer.pid}); rank 0 is {where}"
        if sign.state() == "dead":
            return f"no, its process was interrupted or killed, or has crashed; rank 0 was {where}"
        return f"yes; rank 0 is {where}"
    # For a process elsewhere, only the clock says something at once. Nothing depends on it.
    age = time.time() - sign.change[0] / 1e9
    if age < run_lock.SECONDS_UNTIL_DEAD:
        return f"yes; rank 0 is {where}"
    return f"no, its run lock was last renewed {format_seconds(age)} ago; rank 0 was {where}"
