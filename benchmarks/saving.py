"""`clue-ds bench saving`: how long a checkpoint holds up training, against DeepSpeed's own.

One run, from the real build to the real saver, in one process. In turns it makes the same number of
steps without a save (nothing), after a save in the background (background), after one for which
training waits (waits), and after `engine.save_checkpoint` of DeepSpeed (plain), which syncs and
hashes nothing. What a save costs is the time of its turn minus that of the turn without one: the
time for which training waits, and the time by which writing and hashing slow the steps down. A turn
with a save in the background also waits for its end, so that nothing is left out.

The share of training time at `every` steps per checkpoint follows from the cost of a save and the
time of a step. Rejected: training for 1,000 steps per turn, which measures the same with the noise
of an hour.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from clue_ds.benchmarks.description import write_results
from clue_ds.benchmarks.synthetic import write_corpus
from clue_ds.job import watchdog
from clue_ds.pretrain import saving as saves
from clue_ds.pretrain import train

KINDS = ("nothing", "background", "waits", "plain")
LIMIT = 0.035  # of training time, at most, at the default interval
WARMUP_STEPS = 2


class Turn(NamedTuple):
    """Seconds of one turn, of its save until training goes on, and of that to the disk."""

    total: float
    waited: float
    step: float


def saving(
    preset: str = "roberta_tiny_clue",
    batch_size: int = 32,
    seq_length: int = 128,
    deepspeed: str = "zero1",
    precision: str = "fp32",
    steps: int = 20,
    rounds: int = 5,
    every: int = 1_000,
    threads: int | None = None,
    directory: Path | None = None,
    output: Path | None = None,
) -> None:
    """Measure what a save costs training: in the background, in front of it, and DeepSpeed's own.

    Args:
        preset: the model
        batch_size: sequences per step, in one micro-batch
        seq_length: tokens per sequence
        deepspeed: the ZeRO stage, as in a run's config
        precision: fp32 or bf16; fp16 on CUDA
        steps: steps per turn; a save in the background should end within them
        rounds: turns of each kind; the figures are medians
        every: steps between checkpoints for which the share of the time is calculated
        threads: number of torch's threads on a CPU; default torch's own
        directory: where checkpoints are written and deleted again; default the current directory
        output: JSON file for the result
    """
    if threads is not None:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=directory or Path.cwd()) as temporary:
        folder = Path(temporary)
        num_rows = batch_size * (WARMUP_STEPS + steps * rounds * len(KINDS) + 1)
        write_corpus(folder / "corpus", 2 * num_rows * seq_length, 1, holes="nothing")
        settings = {
            "run_dir": folder / "run",
            "deepspeed": deepspeed,
            "data.corpus": folder / "corpus",
            "data.seq_length": seq_length,
            "model.preset": preset,
            "train.global_batch_size": batch_size,
            "train.micro_batch_size": batch_size,
            "train.precision": precision,
            "train.warmup_steps": 0,
            "checkpoint.keep": 1,
        }
        arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        config = train.parse(arguments)
        # INT and TERM end it: there is no run to continue, so nothing to save.
        watchdog.start(config.health, "clue-ds bench saving", can_stop=False)
        run = train.build(config)
        with contextlib.redirect_stdout(io.StringIO()):
            turns = measure(run, steps, rounds)
        published = (folder / "run/background/checkpoints").glob("step-*/**/*")
        size = sum(path.stat().st_size for path in published if path.is_file())
        run.loader.close()
        run.writers.close()
    result = {
        "benchmark": "saving",
        "setting": {
            "preset": preset,
            "parameters": run.engine.num_parameters,
            "batch_size": batch_size,
            "seq_length": seq_length,
            "deepspeed": deepspeed,
            "precision": precision,
            "threads": torch.get_num_threads(),
            "steps": steps,
            "rounds": rounds,
            "every": every,
            "checkpoint_bytes": size,
        },
        **figures(turns, every),
    }
    show(result)
    if output is not None:
        write_results(output, result)


def measure(run: train.Run, steps: int, rounds: int) -> dict[str, list[Turn]]:
    """Turns of each kind; every round has another order."""
    run.engine.module.train()
    save = ways_to_save(run)
    for _ in range(WARMUP_STEPS):
        step(run)
    for kind in KINDS[1:]:  # the first copy takes the memory that later ones use again
        save[kind](1)()
    turns: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for position in range(len(KINDS)):
            kind = KINDS[(number + position) % len(KINDS)]
            shutil.rmtree(Path(run.config.run_dir) / "plain", ignore_errors=True)
            os.sync()  # what another kind left to the disk is not this one's
            began = time.perf_counter()
            finish = save[kind](number + 2)
            waited = time.perf_counter() - began
            for _ in range(steps):
                step(run)
            stepped = time.perf_counter() - began - waited
            finish()
            turns[kind].append(Turn(time.perf_counter() - began, waited, stepped / steps))
    return turns


def step(run: train.Run) -> None:
    """One update, as the loop makes it."""
    for micro_batch in run.engine.micro_batches(next(run.loader)):
        run.engine.backward(run.engine.forward(**micro_batch).loss)
    float(run.engine.step(1e-5))


def ways_to_save(run: train.Run) -> dict[str, Callable[[int], Callable[[], None]]]:
    """By kind, a function that saves after a step number and returns one that waits for the end."""

    def saver(kind: str, async_save: bool) -> saves.Saver:
        config = run.config.model_copy(
            update={
                "run_dir": f"{run.config.run_dir}/{kind}",
                "checkpoint": run.config.checkpoint.model_copy(update={"async_save": async_save}),
            }
        )
        return saves.Saver(run.engine, dataclasses.replace(run.identity, config=config))

    def with_saver(kind: str, async_save: bool) -> Callable[[int], Callable[[], None]]:
        ours = saver(kind, async_save)

        def save(number: int) -> Callable[[], None]:
            ours.save(number)
            return ours.wait

        return save

    def plain(number: int) -> Callable[[], None]:
        place = Path(run.config.run_dir) / "plain"
        deepspeed = run.engine._deepspeed
        capturing = deepspeed.checkpoint_engine
        deepspeed._configure_checkpointing()  # DeepSpeed's own checkpoint engine
        deepspeed.save_checkpoint(str(place))
        deepspeed.checkpoint_engine = capturing
        return lambda: None

    return {
        "nothing": lambda number: lambda: None,
        "background": with_saver("background", True),
        "waits": with_saver("waits", False),
        "plain": plain,
    }


def figures(turns: dict[str, list[Turn]], every: int) -> dict[str, Any]:
    """Costs against the turn without a save of the same round."""
    seconds_per_step = float(np.median([turn.step for turn in turns["nothing"]]))
    kinds = {}
    for kind in KINDS[1:]:
        pairs = zip(turns[kind], turns["nothing"], strict=True)
        costs = np.array([with_save.total - without.total for with_save, without in pairs])
        p20, cost, p80 = (float(value) for value in np.percentile(costs, (20, 50, 80)))
        kinds[kind] = {
            "cost_seconds": {"median": cost, "p20": p20, "p80": p80},
            "waited_seconds": float(np.median([turn.waited for turn in turns[kind]])),
            "share": cost / (every * seconds_per_step + cost),
            # At shorter intervals a save costs more than LIMIT.
            "shortest_interval": max(1, int(np.ceil(cost * (1 / LIMIT - 1) / seconds_per_step))),
        }
    return {"seconds_per_step": seconds_per_step, "limit": LIMIT, "kinds": kinds}


def show(result: dict[str, Any]) -> None:
    from rich.table import Table

    setting = result["setting"]
    table = Table(
        title=f"{setting['preset']}, {setting['checkpoint_bytes'] / 2**20:,.0f} MiB on disk, "
        f"{result['seconds_per_step']:.2f} s per step"
    )
    names = ("save", "costs", "training waits", f"share at {setting['every']:,} steps")
    for name in (*names, f"{LIMIT:.1%} at"):
        table.add_column(name, justify="right")
    for kind, row in result["kinds"].items():
        table.add_row(
            kind,
            f"{row['cost_seconds']['median']:.2f} s",
            f"{row['waited_seconds']:.2f} s",
            f"{row['share']:.2%}",
            f"{row['shortest_interval']:,} steps",
        )
    Console().print(table)
