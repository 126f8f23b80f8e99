"""`clue-ds finetune`: one run for each task, setting and seed; keep the best model of each task.

Guarantees: every result is a file, so the same command continues after a kill without repeating a
finished run; the processes of a pool and the jobs of an array share only the output directory; the
best settings are those with the highest mean dev score over the seeds, and the model that is
kept is the best of their seeds.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from rich.console import Console

from clue_ds import dist
from clue_ds.data.build.workers import spawned
from clue_ds.errors import UserError, check_least, run_module
from clue_ds.job import watchdog
from clue_ds.job.alone import Alone
from clue_ds.presets import Kernels
from clue_ds.settings import arguments
from clue_ds.settings.arguments import PathOrName
from clue_ds.settings.sections import DEFAULT_HEALTH, HealthSection
from clue_ds.tasks import kinds, outputs, registry
from clue_ds.tasks.finetune.directory import RESULT, baselines, locked, read_result, shown_scores
from clue_ds.tasks.task import Precision, Task

if TYPE_CHECKING:
    from clue_ds.tasks.finetune.loop import Stopped
    from clue_ds.tasks.finetune.run import RunSpec

BEST = "best"
GRID_KEYS = ("lr", "epochs", "batch_size", "max_length", "warmup_ratio", "weight_decay", "dropout")


def finetune(
    task: tuple[PathOrName, ...],
    model: PathOrName,
    data: PathOrName,
    output: Path = Path("runs/finetune"),
    pair_model: PathOrName | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    warmup_ratio: float | None = None,
    weight_decay: float | None = None,
    dropout: float | None = None,
    patience: int | None = None,
    precision: Precision = "fp32",
    kernels: Kernels = "torch",
    seed: int = 42,
    seeds: int = 1,
    grid: tuple[str, ...] = (),
    workers: int = 1,
    array_task: str | None = None,
    limit: int | None = None,
    from_scratch: bool = False,
    force: bool = False,
    health: HealthSection = DEFAULT_HEALTH,
) -> None:
    """Fine-tune a model on tasks of CLUE or your own; keep the epoch with the best dev score.

    After an interruption, run the same command again to continue. To use several GPUs or ranks:
    clue-ds launch --local 2 -- finetune ...

    Args:
        task: task names (afqmc tnews iflytek cmnli csl cluewsc2020 cmrc2018 c3 chid cluener ocnli
            drcd msraner), all for the first ten, or YAML files that describe your own tasks
            (docs/finetuning.md).
        model: a run directory, one of its checkpoints, a model directory or zip, or a name on the
            Hugging Face hub.
        data: the directory that holds the tasks' files, or hub to read CLUE's from the Hugging
            Face hub.
        output: the directory for the runs, each in TASK/NAME; TASK/best/model is the best model.
        pair_model: the model to start from for tasks of text pairs, instead of --model: one that
            was trained further on labelled pairs (train.objective pair).
        lr: peak learning rate. This option and the next three default to the task's settings.
        epochs: passes over the training examples.
        batch_size: examples per step, over all ranks.
        max_length: most tokens of a text, or of both texts of a pair; longer ones are truncated.
        warmup_ratio: fraction of the steps in which the learning rate rises; default 0.1.
        weight_decay: weight decay, except on LayerNorm and biases; default 0.01.
        dropout: dropout of hidden states and of attention probabilities; default the model's, which
            is 0 if it was pretrained without.
        patience: stop after this many epochs without a better dev score; default never.
        precision: precision of the forward pass; bf16 is faster on hardware that supports it.
        kernels: implementation of the fused operations: triton, torch, or auto (triton on a GPU).
        seed: seed of the head's weights, the order of examples and dropout; the first of --seeds.
        seeds: number of seeds to run: seed, seed + 1, ...
        grid: values to try in every combination: lr=1e-4,4e-4 epochs=5,8.
        workers: number of runs at a time, each in its own process; on several GPUs, the processes
            are spread over them.
        array_task: I/N, for job arrays: do only every N-th run, starting with the I-th from 0.
        limit: train on this many examples only, drawn at random.
        from_scratch: start from random weights of the model's shape, for comparison.
        force: discard earlier runs in the output directory that have other settings.
        health: deadlines for the ranks of a job.
    """
    # Here and below, what needs torch is imported in the functions, because `--help` needs none.
    from clue_ds.tasks.finetune.loop import Recipe
    from clue_ds.tasks.finetune.run import RunSpec

    for name, number in (("seeds", seeds), ("workers", workers), ("limit", limit)):
        check_least(name, number, 1)
    given: dict[str, Any] = dict(
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        dropout=dropout,
        patience=patience,
    )
    fixed = {key: value for key, value in given.items() if value is not None}
    fixed["precision"] = precision
    points = [
        {**fixed, **point, "seed": seed + number}
        for point in parse_grid(grid, fixed)
        for number in range(seeds)
    ]
    for point in points:
        Recipe(**point)  # a UserError now, and not after reading the data
    names = [n for name in task for n in (registry.ALL if name == "all" else (name,))]
    tasks = {name: _trainable(name) for name in names}
    varied = {word.partition("=")[0] for word in grid}
    specs = [
        RunSpec(
            task=name,
            model=pair_model if pair_model and tasks[name].kind == "pair" else model,
            data=data,
            directory=output / tasks[name].name / _run_name(point, varied),
            changes=point,
            from_scratch=from_scratch,
            limit=limit,
            force=force,
            kernels=kernels,
        )
        for name in names
        for point in points
    ]
    with watchdog.reporting(), dist.report_errors_once():
        share = _array_share(specs, array_task)
        stopped = _run_all(share, workers, kernels, health)
        for directory in dict.fromkeys(spec.directory.parent for spec in specs if not stopped):
            _keep_best(directory, [spec for spec in specs if spec.directory.parent == directory])
        dist.barrier()
    dist.report_end(stopped)


def _trainable(name: str) -> Task:
    task = registry.get(name)
    if task.answered_by:
        raise UserError(
            f"{name} has no training data; fine-tune {' or '.join(task.answered_by)}, whose models "
            f"answer it: clue-ds predict --task {name}, clue-ds submit --models"
        )
    return task


def parse_grid(grid: tuple[str, ...], fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values in `key=value,value` words; [{}] without words."""
    from clue_ds.tasks.finetune.loop import Recipe

    hints = get_type_hints(Recipe)
    choices: list[list[tuple[str, Any]]] = []
    for word in grid:
        key, equals, values = word.partition("=")
        if not equals or key not in GRID_KEYS:
            raise UserError(
                f"--grid {word!r}: write KEY=VALUE,VALUE with a key of {', '.join(GRID_KEYS)}"
            )
        if key in fixed:
            raise UserError(
                f"--grid {key}= and --{key.replace('_', '-')} are both given; give only one"
            )
        try:
            convert = float if key == "dropout" else hints[key]
            choices.append([(key, convert(value)) for value in values.split(",")])
        except ValueError as error:
            raise UserError(f"--grid {word!r}: {error}") from None
    return [dict(combination) for combination in itertools.product(*choices)]


def _run_name(point: dict[str, Any], varied: set[str]) -> str:
    return ",".join(f"{key}={point[key]}" for key in (*sorted(varied), "seed"))


def _array_share(specs: list[RunSpec], array_task: str | None) -> list[RunSpec]:
    if array_task is None:
        return specs
    index, slash, count = array_task.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--array-task {array_task!r} must be I/N, with I from 0 to N - 1")
    return specs[int(index) :: int(count)]


def _run_all(specs: list[RunSpec], workers: int, kernels: Kernels, health: HealthSection) -> bool:
    """Do the runs; return whether the job was asked to stop before the last one ended."""
    from clue_ds.model import ops
    from clue_ds.tasks.finetune import checks

    ops.choose_kernels(kernels)
    if dist.world_size() > 1 and workers > 1:
        raise UserError(
            "--workers is for a command without clue-ds launch: launched ranks train one run "
            "together; drop --workers"
        )
    # Without a lock, because the handler of a signal writes it.
    told = multiprocessing.get_context("spawn").Value("b", 0, lock=False)
    with _watching(health, told):
        checks.check(specs, workers)
        if workers <= 1 or len(specs) <= 1:
            return _one_by_one(specs)
        return _in_a_pool(specs, workers, kernels, health, told)


def _watching(health: HealthSection, told: Any) -> contextlib.AbstractContextManager[Any]:
    """Start the watchdog and meet the other ranks; in the block the job may be asked to stop.

    A single process under `clue-ds launch` starts the watchdog too, because the launcher passes
    requests to stop on to it. `told`: see Alone.
    """
    if dist.world_size() == 1 and dist.job_dir() is None:
        return Alone(health, "clue-ds finetune", told)
    watchdog.start(health, "clue-ds finetune")
    if dist.world_size() > 1:
        from clue_ds.pretrain import engine

        engine.start()
    return contextlib.nullcontext()


def _one_by_one(specs: list[RunSpec]) -> bool:
    from clue_ds.tasks.finetune import run
    from clue_ds.tasks.finetune.loop import Stopped

    for spec in specs:
        try:
            _print_result(spec, run.run(spec))
        except Stopped as reason:
            _print_stopped(spec, reason)
            return True
    return False


def _in_a_pool(
    specs: list[RunSpec], workers: int, kernels: Kernels, health: HealthSection, told: Any
) -> bool:
    """Each process of the pool learns by itself that the job is asked to stop."""
    from clue_ds.tasks.finetune import run
    from clue_ds.tasks.finetune.loop import Stopped

    # The cores that this job may use, which may be fewer than the host has (a Slurm cpuset).
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    num_started = multiprocessing.get_context("spawn").Value("i", 0)
    stopped = False
    with spawned(workers, _start_worker, num_started, threads, kernels, health, told) as pool:
        jobs = {pool.submit(run.run, spec, False): spec for spec in specs}
        for job in concurrent.futures.as_completed(jobs):
            if job.cancelled():
                continue
            try:
                _print_result(jobs[job], job.result())
            except Stopped as reason:
                _print_stopped(jobs[job], reason)
                stopped = True
                for waiting in jobs:
                    waiting.cancel()
    return stopped


def _start_worker(
    num_started: Any, threads: int, kernels: Kernels, health: HealthSection, told: Any
) -> None:
    import torch

    from clue_ds.model import ops

    take_device(num_started)
    torch.set_num_threads(threads)
    ops.choose_kernels(kernels)
    # Under a launcher (clue-ds launch, sbatch) the process has a watchdog, whose store must not
    # take the port that was given to the parent's rank.
    os.environ.pop("MASTER_PORT", None)
    _watching(health, told).__enter__()  # until the process ends


def take_device(num_started: Any) -> None:
    """Spread the processes of a pool over the GPUs; they share the Value `num_started`."""
    import torch

    with num_started.get_lock():
        number = num_started.value
        num_started.value += 1
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(number % torch.accelerator.device_count())


def _print_stopped(spec: RunSpec, reason: Stopped) -> None:
    if dist.rank() == 0:
        print(f"{spec.directory}: {reason}; the same command continues it", flush=True)


def _print_result(spec: RunSpec, result: dict[str, Any]) -> None:
    if dist.rank() > 0:
        return
    best, shown = result["best"], shown_scores(result)
    said = " and ".join(f"{title} {best[key]:.2%}" for key, title in shown)
    guesses = [
        f"; {name} would give {' and '.join(f'{scores[key]:.2%}' for key, _ in shown)}"
        for name, scores in baselines(result).items()
    ]
    Console(highlight=False, soft_wrap=True).print(
        f"{spec.directory}: dev {said} in epoch {best['epoch']:g}{''.join(guesses)}"
    )


def _keep_best(directory: Path, specs: list[RunSpec]) -> None:
    """Once all runs are done, link DIRECTORY/best to the best one and delete the other models."""
    if dist.rank() > 0:
        return
    done = [r.directory for r in specs if (r.directory / RESULT).is_file()]
    if len(done) < len(specs):
        print(
            f"{len(done)} of {len(specs)} runs in {directory} are done; the last job of the array "
            "to end chooses the best"
        )
        return
    with locked(directory, wait=True), outputs.explained(directory, "give another --output"):
        kind = kinds.of(registry.get(specs[0].task))
        best = _choose(kind, {run_dir: read_result(run_dir) for run_dir in done})
    print(f"best model: {directory / BEST / 'model'} ({best.name})")


def _choose(kind: kinds.Kind, results: dict[Path, dict[str, Any]]) -> Path:
    """Link the best of the runs, delete the models of the others, return the best."""
    by_settings: dict[str, list[Path]] = {}
    for run_dir, result in results.items():
        settings = json.dumps({**result["recipe"], "seed": None})
        by_settings.setdefault(settings, []).append(run_dir)

    def score(run_dir: Path) -> float:
        return kind.best_by(results[run_dir]["best"])

    winners = max(by_settings.values(), key=lambda runs: sum(map(score, runs)) / len(runs))
    best = max(winners, key=score)
    directory = best.parent
    for run_dir in results:
        # Another command may have begun to work there; then the model is its own.
        if run_dir != best:
            with contextlib.suppress(UserError), locked(run_dir):
                shutil.rmtree(run_dir / "model", ignore_errors=True)
    # Two jobs may end at the same time; both choose the same run, so either link is right.
    link = directory / f".{BEST}-{socket.gethostname()}-{os.getpid()}"
    link.symlink_to(best.name)
    link.replace(directory / BEST)
    return best


def main(argv: list[str]) -> None:
    """The entry point that `clue-ds launch` starts on every rank."""
    arguments.call(finetune, "clue-ds finetune", argv)


if __name__ == "__main__":
    sys.exit(run_module("clue-ds finetune", main))
