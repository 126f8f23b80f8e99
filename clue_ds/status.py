"""`clue-ds status RUN...`: the progress of runs, read from their files on any machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from clue_ds import config as run_config
from clue_ds.checkpoint import manifest
from clue_ds.config import RunConfig
from clue_ds.errors import UserError
from clue_ds.job import run_lock
from clue_ds.metrics import LOG, format_seconds, parse_line

SECONDS_BETWEEN_LOOKS = 3.0
# Keys of a log line that `describe` uses.
SHOWN = {"step", "seconds_per_step", "mfu", "tokens_per_second", "loss"}


def status(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], watch: bool = False) -> None:
    """Show the progress of runs: step, speed, time left, newest checkpoint, and if one is running.

    Args:
        runs: directories of runs; several are shown in one table.
        watch: show a table that is renewed every few seconds, until Ctrl-C or the end of all runs.
    """
    if not runs:
        raise UserError("give the directory of a run")
    if watch:
        _watch(runs)
    elif len(runs) == 1:
        print("\n".join(describe(runs[0])))
    else:
        _console().print(_table(runs))


def _console() -> Any:
    from rich.console import Console

    # When the output is not a terminal, rich would wrap the rows at 80 columns.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _watch(runs: tuple[Path, ...]) -> None:
    from rich.live import Live

    with Live(_table(runs), console=_console(), auto_refresh=False) as live:
        while any(_is_alive(run) for run in runs):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            live.update(_table(runs), refresh=True)


def _is_alive(run: Path) -> bool:
    return _state(run, False).startswith("yes")


def _table(runs: tuple[Path, ...]) -> Any:
    """A row for each run."""
    from rich.table import Table

    table = Table("run", "step", "loss", "held out", "tokens/s", "time left", "saved", "alive")
    for run in runs:
        config, line = _read(run)
        steps, step = config.train.steps, 0 if line is None else line["step"]
        figures = ["-"] * 4
        if line is not None:
            held_out = _last_line(run / LOG, SHOWN | {"held_out_loss"})
            figures = [
                f"{line['loss']:.4f}",
                "-" if held_out is None else f"{held_out['held_out_loss']:.4f}",
                f"{line['tokens_per_second']:,.0f}",
                format_seconds((steps - step) * line["seconds_per_step"]),
            ]
        newest = manifest.published(run / manifest.FOLDER)
        saved = f"{manifest.step_of(newest[0]):,}" if newest else "-"
        alive = _state(run, step >= steps).partition(";")[0].partition(",")[0]
        done = "done" if step >= steps else f"{step / steps:.1%}"
        table.add_row(str(run), f"{step:,} ({done})", *figures, saved, alive)
    return table


def _read(run: Path) -> tuple[RunConfig, dict[str, Any] | None]:
    """The config of a run, and the last line of its log."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not a run: it has no config.yaml; give the run_dir of a pretraining run"
        )
    return run_config.load(run / "config.yaml"), _last_line(run / LOG)


def describe(run: Path) -> list[str]:
    """One fact per line."""
    config, line = _read(run)
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
    lines.append(f"alive       {_state(run, step >= steps)}")
    return lines


def _last_line(path: Path, keys: set[str] = SHOWN) -> dict[str, Any] | None:
    """The last complete line with these keys; one that is still being written is ignored."""
    if not path.is_file():
        return None
    for text in reversed(path.read_bytes().splitlines()):
        line = parse_line(text)
        if line is not None and keys <= line.keys():
            return line
    return None


def _state(run: Path, is_done: bool) -> str:
    sign = run_lock.read(run / run_lock.FILE)
    if sign is None or sign.peer is None:
        return "no, it is done" if is_done else "no; to continue, start the same pretrain command"
    where = f"process {sign.peer.pid} on {sign.peer.host}"
    if sign.is_on_this_machine():
        if sign.state() == "stopped":
            return f"yes, but stopped (to continue: kill -CONT {sign.peer.pid}); rank 0 is {where}"
        if sign.state() == "dead":
            return f"no, its process was killed or interrupted, or has crashed; rank 0 was {where}"
        return f"yes; rank 0 is {where}"
    # For a process elsewhere, only the clock says something at once. Nothing depends on it.
    age = time.time() - sign.change[0] / 1e9
    if age < run_lock.SECONDS_UNTIL_DEAD:
        return f"yes; rank 0 is {where}"
    return f"no, its run lock was last renewed {format_seconds(age)} ago; rank 0 was {where}"
