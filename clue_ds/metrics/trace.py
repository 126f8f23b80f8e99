"""torch's profiler over chosen steps of a run: what the CPU and the GPU did in them, and when.

Guarantees: without chosen steps nothing is imported or recorded; only rank 0 records; the file
appears complete or not at all, and a run that is stopped within the steps writes those it has made;
a trace that can't be written is a note, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clue_ds import dist

if TYPE_CHECKING:
    import torch

FOLDER = "profile"


class Trace:
    """Records the steps `steps[0]` to `steps[1]`, counted from 1; none if `steps` is empty."""

    def __init__(self, steps: Sequence[int], run_dir: str) -> None:
        self.steps = steps if dist.rank() == 0 else ()
        self.folder = Path(run_dir) / FOLDER
        self._first = 0
        self._profiler: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Start recording if `step` is chosen, and mark where each step begins."""
        if not self.steps:
            return
        if self._profiler is not None:
            self._profiler.step()
        elif self.steps[0] <= step <= self.steps[1]:
            self._start(step)

    def ends(self, step: int, is_last: bool) -> bool:
        """Whether `step`, which was made, is the last to record: the last chosen, or the run's."""
        return self._profiler is not None and (is_last or step >= self.steps[1])

    def write(self, step: int) -> str:
        """Stop after `step` and write the file; returns a note for the user."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        path = self.folder / f"steps-{self._first}-{step}.json.gz"
        partial = path.with_name(f".{path.name}")  # torch packs what ends with .gz
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.replace(path)
        except OSError as error:
            return f"can't write the trace {path}: {error.strerror or error}; the run goes on"
        return f"trace of steps {self._first} to {step}: {path}; open it at https://ui.perfetto.dev"

    def _start(self, step: int) -> None:
        from torch import profiler

        self._first = step
        # With a schedule it marks each step.
        self._profiler = profiler.profile(schedule=lambda _: profiler.ProfilerAction.RECORD)
        self._profiler.step_num = step
        self._profiler.start()
