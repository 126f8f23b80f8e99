"""Stopping early without losing a step: who asks, how all ranks agree, when a chain gives up.

A batch system warns with USR1 (sbatch --signal) or TERM (pre-emption); `clue-ds launch` leaves a
file when it gets USR1 itself. One rank that was asked is enough.

Guarantees: all ranks stop after the same step, because they add up their answers in an all-reduce;
that costs nothing measurable, because they ask about once a second and agree on the step of the
next question too; a signal that comes while the run is ending changes nothing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from clue_ds import dist, files
from clue_ds.launcher import contract

SECONDS_BETWEEN_QUESTIONS = 1.0
MAX_STEPS_BETWEEN_QUESTIONS = 1_000
RESTARTS_FILE = "restarts.json"


class StopRequest:
    """Was anybody asked to stop? `agreed` is for the training loop, the rest for its watchdog."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.begin()

    def begin(self) -> None:
        """A run begins, whose steps count from anywhere: its pace isn't known yet."""
        self._next_question = 0
        self._last_step: int | None = None
        self._last_time = time.monotonic()

    def ask(self) -> None:
        """This rank was asked; from any thread."""
        self._asked.set()

    def look_for_file(self) -> None:
        """Notice a request that came through `clue-ds launch`."""
        directory = dist.job_dir()
        if directory is not None and (directory / contract.STOP_FILE).exists():
            self.ask()

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after this step; every rank must call it after every step."""
        if step < self._next_question:
            return False
        now = time.monotonic()
        asked, seconds = dist.all_reduce([float(self._asked.is_set()), now - self._last_time])
        pause = 1.0
        if self._last_step is not None:
            pace = seconds / dist.world_size() / (step - self._last_step)
            pause = SECONDS_BETWEEN_QUESTIONS / max(pace, 1e-6)
        self._next_question = step + int(min(MAX_STEPS_BETWEEN_QUESTIONS, max(1, pause)))
        self._last_step, self._last_time = step, now
        return asked > 0


def check_progress(run_dir: str | Path, step: int) -> None:
    """Leave with STATUS_NO_PROGRESS after too many restarts in a row from the same step.

    Counts only where a launcher set a limit, that is in batch jobs that restart by themselves.
    """
    limit = os.environ.get(contract.MAX_RESTARTS_VARIABLE)
    if limit is None:
        return
    message = None
    if dist.rank() == 0:
        path = Path(run_dir) / RESTARTS_FILE
        before = json.loads(path.read_text()) if path.is_file() else {"step": -1, "restarts": 0}
        restarts = before["restarts"] + 1 if before["step"] == step else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps({"step": step, "restarts": restarts}) + "\n")
        if restarts > int(limit):
            message = (
                f"clue-ds pretrain: error: {restarts} restarts in a row began at step {step} and "
                "saved nothing. Lower checkpoint.every, give the job more time, or look for the "
                f"error in the log of the last one; then delete {path} to go on"
            )
            print(message, flush=True)
    if dist.broadcast(message) is not None:
        raise SystemExit(contract.STATUS_NO_PROGRESS)
