"""Where a run's metrics go: the console, log.jsonl, TensorBoard and trackers.

Guarantees: log.jsonl has at most one line per step number, also after a resume; only rank 0 writes;
a file that is damaged or can't be written, and a tracker that fails, is one warning, and never ends
or blocks the run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from clue_ds import config as run_config
from clue_ds import dist, files
from clue_ds.checkpoint import manifest
from clue_ds.config import RunConfig
from clue_ds.errors import first_line
from clue_ds.export import card, huggingface
from clue_ds.job import watchdog
from clue_ds.metrics import EVENTS, LOG, describe_seconds, format_line, parse_line, trackers
from clue_ds.metrics.event_file import Appender, EventFile
from clue_ds.model.weights import expected_shapes
from clue_ds.presets import ModelConfig

CARD = "model_card.md"  # of a run's directory, written for trackers

# The watch thread looks once per second, and then waits for a signal.
SECONDS_FOR_THE_WATCHDOG = 3.0


class Writers:
    """Console, log.jsonl, TensorBoard and trackers on rank 0; other ranks write nothing.

    `on_line`: called with every log line, once it is written.
    `start_step` is the number of updates made before this start; later lines are removed from
    log.jsonl. What can't be written is one warning for each file, and the run goes on.
    An error that leaves a `with` block of it ends the trackers' runs as failed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        start_step: int,
        tensorboard: bool,
        compiles: bool = False,
    ) -> None:
        self.total_steps, self._tensorboard, self._compiles = total_steps, tensorboard, compiles
        self.on_line: Callable[[dict[str, Any]], None] | None = None
        self._run_dir, self._trackers = Path(run_dir), list[trackers.Tracker]()
        self._open = dist.rank() == 0
        if self._open:
            self._console = _console()
            self._open_files(start_step)

    def _open_files(self, start_step: int) -> None:
        self._first_step = start_step + 1
        path = self._run_dir / LOG
        earlier: list[dict[str, Any]] = []
        try:
            earlier = truncate_log(path, start_step, self.note)
        except OSError as error:
            self.note(f"warning: can't remove old lines from {path}: {error}; the run goes on")
        elapsed = earlier[-1].get("elapsed_s") if earlier else 0.0
        self._elapsed_before = float(elapsed) if isinstance(elapsed, int | float) else 0.0
        self._began = time.perf_counter()
        self._jsonl = Appender(path, self.note)
        self._history = Appender(self._run_dir / EVENTS, self.note)
        self._events = (
            EventFile(self._run_dir, start_step, self.note) if self._tensorboard else None
        )

    def go_back(self, step: int) -> None:
        """Remove the lines after `step`, and go on from there; trackers keep what they have."""
        if self._open:
            self._close_files()
            self._open_files(step)

    def open_trackers(self, config: RunConfig) -> None:
        """Open the trackers of the config, and give them its values and its file."""
        if self._open:
            settings = dict(run_config.flatten(config.model_dump(mode="json")))
            for name in dict.fromkeys(config.log.trackers):
                tracker = trackers.Tracker(name, self._run_dir, settings, self.note)
                tracker.attach(self._run_dir / "config.yaml")
                self._trackers.append(tracker)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            self._close_trackers(failed=True)

    def note(self, text: str) -> None:
        """Print a sentence to the console."""
        if self._open:
            self._print(text, markup=False)

    def _print(self, text: str, **options: Any) -> None:
        # Output into a file on a full disk ends no run.
        with suppress(OSError):
            self._console.print(text, highlight=False, soft_wrap=True, **options)

    def write(self, line: dict[str, Any]) -> None:
        """Write one line (from Meter.flush, plus lr and samples) to all places."""
        if not self._open:
            return
        line = {**line, "elapsed_s": self._elapsed_before + time.perf_counter() - self._began}
        self._jsonl.append((json.dumps(line) + "\n").encode())
        self._print(format_line(line, self.total_steps))
        if self.on_line is not None:
            self.on_line(line)
        left = self.total_steps - line["step"]
        if line["step"] == self._first_step and left:
            seconds = line["seconds_per_step"]
            took = f"the first step took {describe_seconds(seconds)}"
            if self._compiles:
                self.note(f"{took}, most of it to compile; the next line shows the others' time")
            else:
                self.note(
                    f"{took}; the other {left:,} take about {describe_seconds(left * seconds)}, or "
                    "less, because the first one warms up"
                )
        if self._events is not None:
            self._events.write(line)
        for tracker in self._trackers:
            tracker.write(line)

    def attach_card(self, model: ModelConfig) -> None:
        """Give the model card of the newest checkpoint to the trackers."""
        if not self._trackers:
            return
        path = self._run_dir / CARD
        try:
            files.write_text(path, _model_card(self._run_dir, model))
        except Exception as error:  # a card is not worth a run
            self.note(
                f"warning: the trackers get no model card, because {path} can't be made: "
                f"{type(error).__name__}: {first_line(error)}; "
                "`clue-ds export` writes the card with the model"
            )
            return
        for tracker in self._trackers:
            tracker.attach(path)

    def event(self, event: str, step: int, **facts: Any) -> None:
        """Add a start, save or end to events.jsonl, for `clue-ds report`."""
        if self._open:
            now = time.strftime("%Y-%m-%d %H:%M:%S%z")
            record = {"event": event, "step": step, "time": now, **facts}
            self._history.append((json.dumps(record, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        """Close the files, and end the trackers' runs."""
        if self._open:
            self._close_files()
            self._close_trackers(failed=False)

    def _close_files(self) -> None:
        self._jsonl.close()
        self._history.close()
        if self._events is not None:
            self._events.close()

    def _close_trackers(self, failed: bool) -> None:
        closing, self._trackers = self._trackers, []
        watch = watchdog.current()
        with watch.section("trackers"):
            trackers.close(closing, failed, watch.mark)


def _model_card(run_dir: Path, model: ModelConfig) -> str:
    """The card that `clue-ds export` would write for the newest checkpoint."""
    import torch

    shapes = expected_shapes(model).items()
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    values = huggingface.config_json(model, weights) | {"torch_dtype": "float32"}
    newest = manifest.published(run_dir / manifest.FOLDER)[0]
    return card.model_card(run_dir.absolute().name, values, weights, newest)


def truncate_log(
    path: Path, step: int, warn: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Remove the lines after `step`, and those that are damaged; returns the rest.

    A last line that a crash cut off is removed without a warning. OSError when it can't be done.
    """
    if not path.exists():
        return []
    kept, num_damaged, end, good = [], 0, 0, True
    with path.open("rb") as file:
        for raw in file:
            line = parse_line(raw)
            if line is None:
                num_damaged += raw.endswith(b"\n")
                good = False
            elif line["step"] <= step:
                kept.append(line)
                end += len(raw) if good else 0
            else:
                good = False
    if num_damaged:
        warn(f"warning: {num_damaged} damaged lines of {path} were removed")
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    else:
        # The lines to remove are the last ones; cutting them off takes no room on a full disk.
        os.truncate(path, end)
    return kept


def _console() -> Any:
    """A rich console, which omits colours when the output is not a terminal.

    A broken pipe is the watch thread's matter (job/watchdog.py): within seconds it ends this
    process, or sends the output of a run that saves and stops to /dev/null.
    """
    from rich.console import Console

    class PatientConsole(Console):
        def on_broken_pipe(self) -> None:
            time.sleep(SECONDS_FOR_THE_WATCHDOG)

    # Without a terminal rich would wrap lines at 80 columns.
    columns = os.environ.get("COLUMNS")
    plain = PatientConsole()
    return plain if plain.is_terminal or columns else PatientConsole(width=200)
