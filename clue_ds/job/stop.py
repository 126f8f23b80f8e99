"""Stopping early without losing a step, and ending a chain of restarts that makes no progress.

A batch system sends USR1 (sbatch --signal) or TERM (pre-emption) as a warning, and a user sends INT
(Ctrl-C); `clue-ds launch` creates a file when it receives one of them itself. It is enough if one
rank was asked to stop.

Guarantees: all ranks stop after the same step, because they sum their answers in an all-reduce. The
cost is not measurable: they do so about once per second, and the all-reduce also decides after
which step to do it next. A signal that arrives while the run is ending changes nothing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

from clue_ds import dist, files
from clue_ds.launcher import contract

SECONDS_BETWEEN_CHECKS = 1.0
# A launcher passes on the Ctrl-C that the terminal has sent to the ranks too, as INT or as TERM.
# Signals within this time of the first are the same request.
SECONDS_OF_ONE_REQUEST = 3.0
# `timeout` sends its signal to the process and then to the whole group.
SECONDS_OF_ONE_SENDER = 0.3
MAX_STEPS_BETWEEN_CHECKS = 1_000
RESTARTS_FILE = "restarts.json"


class StopRequest:
    """Whether a rank was asked to stop. The loop calls `agreed`, the watchdog the other methods.

    `is_agreed`: all ranks know of the request, and save and stop now. `seconds`: a clock that shows
    the same time on all ranks after the same step, and moves about once per second.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._first_signal: float | None = None
        self.is_agreed = False
        self.begin()

    def begin(self) -> None:
        """A run begins at any step number; its speed is not known yet."""
        self._next_check = 0
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        self.is_agreed, self.seconds = False, 0.0

    def ask(self) -> None:
        """Record that this rank was asked to stop; any thread may call it."""
        self._asked.set()

    def is_asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._asked.is_set()

    def ask_by_signal(self) -> bool:
        """Record INT or TERM; False for a second signal, which means: end now, without saving."""
        now = time.monotonic()
        grace = SECONDS_OF_ONE_REQUEST if dist.is_launched() else SECONDS_OF_ONE_SENDER
        if self._first_signal is not None and now - self._first_signal > grace:
            return False
        if self._first_signal is None:
            self._first_signal = now
        self.ask()
        return True

    def look_for_file(self) -> None:
        """Check for the file with which `clue-ds launch` passes on a request."""
        directory = dist.job_dir()
        if directory is not None and (directory / contract.STOP_FILE).exists():
            self.ask()

    def launcher_ends(self) -> bool:
        """Whether `clue-ds launch` is ending the job, so that TERM is no request to save."""
        directory = dist.job_dir()
        return directory is not None and (directory / contract.END_FILE).exists()

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after this step; every rank must call this after every step."""
        if step < self._next_check:
            return False
        now = time.monotonic()
        asked, seconds = dist.all_reduce([float(self._asked.is_set()), now - self._last_time])
        self.seconds += seconds / dist.world_size()
        pause = 1.0
        if self._last_step is not None:
            pace = seconds / dist.world_size() / (step - self._last_step)
            pause = SECONDS_BETWEEN_CHECKS / max(pace, 1e-6)
        self._next_check = step + int(min(MAX_STEPS_BETWEEN_CHECKS, max(1, pause)))
        self._last_step, self._last_time = step, now
        self.is_agreed = asked > 0
        return self.is_agreed


def check_progress(run_dir: str | Path, step: int) -> None:
    """Exit with STATUS_NO_PROGRESS after too many restarts in a row from the same step.

    Restarts are counted only if the launcher set a limit, as it does for jobs that are requeued.
    """
    limit = os.environ.get(contract.MAX_RESTARTS_VARIABLE)
    if limit is None:
        return
    message = None
    if dist.rank() == 0:
        path = Path(run_dir) / RESTARTS_FILE
        restarts = _count_restart(path, step)
        if restarts > int(limit):
            message = (
                f"clue-ds pretrain: error: {restarts} restarts in a row began at step {step} and "
                "saved nothing. Lower checkpoint.every, give the job more time, or look for the "
                f"error in the log of the last restart; then delete {path} to continue"
            )
            print(message, flush=True)
    if dist.broadcast(message) is not None:
        raise SystemExit(contract.STATUS_NO_PROGRESS)


def _count_restart(path: Path, step: int) -> int:
    """Number of restarts in a row from `step`, which `path` then holds.

    A file that is damaged or can't be written costs the count, and never the run: one warning.
    """
    restarts = 0
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        restarts = int(before["restarts"]) + 1 if before["step"] == step else 0
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        print(f"warning: can't read {path} ({error!r}); restarts count from 0 again", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps({"step": step, "restarts": restarts}) + "\n")
    except OSError as error:
        print(f"warning: can't write {path}: {error}; this restart is not counted", flush=True)
    return restarts
