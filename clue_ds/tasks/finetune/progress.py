"""What a fine-tuning run shows while it trains: a bar or lines, and TensorBoard's file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from clue_ds.metrics import format_seconds
from clue_ds.metrics.event_file import EventFile

# Between two lines inside an epoch, where there is no terminal for a bar.
SECONDS_BETWEEN_LINES = 30.0
NO_FIGURES = ("step", "epoch")


class Progress:
    """Called after every step and every epoch, on rank 0.

    TensorBoard's file has `loss` after every step, and after every epoch its figures on dev. After
    a resume TensorBoard drops what earlier files say about later steps.
    """

    def __init__(self, name: str, place: Path, console: Console, bar: Bar) -> None:
        self._name, self._place, self._console, self._bar = name, place, console, bar
        self._row = bar.add_task(name)
        self._events: EventFile | None = None
        self._first_step, self._began = 0, time.monotonic()
        self._shown = self._began

    def step(self, step: int, num_steps: int, loss: float, epochs: int) -> None:
        """`step` of `num_steps` is done, counted from 1 over all epochs."""
        if self._events is None:
            self._events = EventFile(self._place, step - 1, self._console.print)
            self._first_step, self._began = step - 1, time.monotonic()
            self._shown = self._began
        self._events.write({"step": step, "loss": loss})
        self._bar.update(
            self._row, completed=step, total=num_steps, description=f"{self._name} {loss:.3f}"
        )
        now = time.monotonic()
        if self._bar.disable and now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            left = (num_steps - step) * (now - self._began) / (step - self._first_step)
            self._console.print(
                f"{self._name}  step {step:,}/{num_steps:,}, epoch "
                f"{epochs * step / num_steps:.1f} of {epochs}  loss {loss:.4f}  "
                f"eta {format_seconds(left)}"
            )

    def epoch(self, line: dict[str, Any]) -> None:
        """An epoch has ended, with its figures on dev."""
        self._shown = time.monotonic()
        if self._events is not None:
            figures = {f"dev/{k}": v for k, v in line.items() if k not in (*NO_FIGURES, "loss")}
            self._events.write({"step": line["step"], "epoch_loss": line["loss"], **figures})

    def close(self) -> None:
        """Close the file."""
        if self._events is not None:
            self._events.close()
