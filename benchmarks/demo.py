"""`clue-ds bench demo`: the demo with several seeds, and what pretraining gained in each.

Every seed is a `clue-ds demo --seed N` in a directory of its own. The same command continues after
a kill: a seed whose demo has ended is not repeated.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from clue_ds.benchmarks.description import write_results
from clue_ds.errors import UserError

FIRST_SEED = 42


def demo(work: Path = Path("runs/bench-demo"), output: Path | None = None, seeds: int = 3) -> None:
    """Run the whole demo with several seeds and print both accuracies of each.

    Args:
        work: the directory for the demos, which are continued there after a kill.
        output: JSON file for the figures, with device, versions and command.
        seeds: number of seeds, from 42 on.
    """
    runs = [_run(work / f"seed={seed}", seed) for seed in range(FIRST_SEED, FIRST_SEED + seeds)]
    gains = [_gain(run) for run in runs]
    print("| seed | pretrained | from random weights | gain in points | minutes |")
    print("|---|---|---|---|---|")
    for run, gain in zip(runs, gains, strict=True):
        pretrained, random_weights = _accuracies(run)
        print(
            f"| {run['seed']} | {pretrained:.1%} | {random_weights:.1%} | {100 * gain:+.2f} | "
            f"{run['seconds'] / 60:.1f} |"
        )
    print(f"mean gain: {100 * statistics.mean(gains):+.2f} points")
    if output is not None:
        mean = statistics.mean(gains)
        write_results(output, {"benchmark": "demo", "mean_gain": mean, "runs": runs})


def _run(directory: Path, seed: int) -> dict[str, Any]:
    """The figures of the demo in `directory`, which is run there unless it has been already."""
    figures = directory / "figures.json"
    if not figures.is_file():
        command = ["demo", "--directory", str(directory), "--seed", str(seed)]
        if subprocess.run([sys.executable, "-m", "clue_ds.cli", *command]).returncode:
            raise UserError(f"the demo with seed {seed} failed; see above, and run this again")
    run: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return run


def _accuracies(run: dict[str, Any]) -> tuple[float, float]:
    accuracy = run["accuracy"]
    return accuracy["pretrained"], accuracy["from random weights"]


def _gain(run: dict[str, Any]) -> float:
    pretrained, random_weights = _accuracies(run)
    return pretrained - random_weights
