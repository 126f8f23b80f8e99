"""`clue-ds finetune`: tasks x settings x seeds, each one run; the best of a task kept.

Guarantees: results are files, so a killed grid continues where it was; processes of one pool, or
jobs of an array, share nothing but the output directory; the best settings are those with the
highest mean dev accuracy over the seeds, and the kept model is the best of its seeds.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any, get_type_hints

import torch
from rich.console import Console

from clue_ds import dist
from clue_ds.config import DEFAULT_HEALTH, HealthSection
from clue_ds.data.build.workers import spawned
from clue_ds.errors import UserError, run_command
from clue_ds.job import watchdog
from clue_ds.model import ops
from clue_ds.tasks import registry
from clue_ds.tasks.finetune import run
from clue_ds.tasks.finetune.loop import Precision, Recipe, Stopped
from clue_ds.tasks.finetune.run import RunSpec

BEST = "best"
GRID_KEYS = ("lr", "epochs", "batch_size", "max_length", "warmup_ratio", "weight_decay")


def finetune(
    task: tuple[str, ...],
    model: str,
    data: str,
    output: Path = Path("runs/finetune"),
    pair_model: str | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    warmup_ratio: float | None = None,
    weight_decay: float | None = None,
    patience: int | None = None,
    precision: Precision = "fp32",
    kernels: ops.Kernels = "torch",
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
    """Fine-tune a model for tasks of CLUE or your own, and keep the epoch that is best on dev.

    The same command again continues what was interrupted. On several GPUs or ranks:
    clue-ds launch --local 2 -- finetune ...

    Args:
        task: names (afqmc tnews iflytek cmnli csl cluewsc2020 ocnli), all (the first six), or YAML
            files that describe your own (docs/finetuning.md).
        model: a run directory, one of its checkpoints, a model directory or zip, or a name on the
            Hugging Face hub.
        data: the directory of the tasks' files, or hub: CLUE's own on the Hugging Face hub.
        output: where the runs go, each in TASK/NAME; TASK/best/model is the best model.
        pair_model: where tasks of pairs start instead: a model trained further on labelled pairs
            (train.objective pair).
        lr: peak learning rate; this and the next five default to the task's own.
        epochs: passes over the training examples.
        batch_size: examples a step, over all ranks.
        max_length: tokens of a text, or of a pair together; what is beyond is cut.
        warmup_ratio: share of the steps in which the learning rate rises.
        weight_decay: not on LayerNorm and biases.
        patience: stop after this many epochs without a better dev accuracy; default never.
        precision: of the forward pass; bf16 is faster where the hardware has it.
        kernels: the fused operations: Triton's, their torch twins, or auto: Triton on a GPU.
        seed: of the head, the order and dropout; the first one where there are several.
        seeds: number of seeds: seed, seed + 1, ...
        grid: values to try, every combination: lr=1e-4,4e-4 epochs=5,8.
        workers: runs at a time, each in a process of its own; where there are several GPUs, in turn
            on each.
        array_task: I/N: do only every N-th run, from the I-th (from 0): for job arrays.
        limit: train on this many examples only, drawn at random.
        from_scratch: random weights of the model's shape, for comparison.
        force: discard runs that are there with other settings.
        health: deadlines, of several ranks.
    """
    given: dict[str, Any] = dict(
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        max_length=max_length,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        patience=patience,
    )
    fixed = {key: value for key, value in given.items() if value is not None}
    fixed["precision"] = precision
    points = [
        {**fixed, **point, "seed": seed + number}
        for point in parse_grid(grid, fixed)
        for number in range(seeds)
    ]
    names = [n for name in task for n in (registry.ALL if name == "all" else (name,))]
    varied = {part.partition("=")[0] for part in grid}
    specs = [
        RunSpec(
            task=name,
            model=pair_model if pair_model and registry.get(name).kind == "pair" else model,
            data=data,
            directory=output / registry.get(name).name / _run_name(point, varied),
            changes=point,
            from_scratch=from_scratch,
            limit=limit,
            force=force,
        )
        for name in names
        for point in points
    ]
    with watchdog.reporting(), dist.one_voice():
        stopped = _run_all(_array_share(specs, array_task), workers, kernels, health)
        for name in dict.fromkeys(names) if not stopped else ():
            of_task = [r for r in specs if registry.get(r.task).name == registry.get(name).name]
            _keep_best(output / registry.get(name).name, of_task)
        dist.barrier()
    dist.report_end(stopped)


def parse_grid(grid: tuple[str, ...], fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of `key=value,value` words; [{}] without any."""
    hints = get_type_hints(Recipe)
    choices: list[list[tuple[str, Any]]] = []
    for word in grid:
        key, equals, values = word.partition("=")
        if not equals or key not in GRID_KEYS:
            raise UserError(
                f"--grid {word!r}: write KEY=VALUE,VALUE with a key of {', '.join(GRID_KEYS)}"
            )
        if key in fixed:
            raise UserError(f"--grid {key}= and --{key.replace('_', '-')} are both given")
        try:
            choices.append([(key, hints[key](value)) for value in values.split(",")])
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
        raise UserError(f"--array-task {array_task!r} must be I/N with I from 0 to N - 1")
    return specs[int(index) :: int(count)]


def _run_all(
    specs: list[RunSpec], workers: int, kernels: ops.Kernels, health: HealthSection
) -> bool:
    """Do the runs; whether the job was asked to stop before all were done."""
    ops.choose_kernels(kernels)
    if dist.world_size() > 1 and workers > 1:
        raise UserError("--workers is for one process; launched ranks do one run together")
    _start_watching(health)
    if workers <= 1 or len(specs) <= 1:
        return _one_by_one(specs)
    return _in_a_pool(specs, workers, kernels, health)


def _start_watching(health: HealthSection) -> None:
    """Meet the other ranks; a single process that was launched hears requests to stop, too."""
    if dist.world_size() > 1 or dist.job_dir() is not None:
        watchdog.start(health, "clue-ds finetune")
    if dist.world_size() > 1:
        from clue_ds.pretrain import engine

        engine.start()


def _one_by_one(specs: list[RunSpec]) -> bool:
    for spec in specs:
        try:
            _print_result(spec, run.run(spec))
        except Stopped as reason:
            _print_stopped(spec, reason)
            return True
    return False


def _in_a_pool(
    specs: list[RunSpec], workers: int, kernels: ops.Kernels, health: HealthSection
) -> bool:
    """Every process of the pool hears for itself that the job is asked to stop."""
    # The cores that this job may use, which may be fewer than the host has (a Slurm cpuset).
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    num_started = multiprocessing.get_context("spawn").Value("i", 0)
    stopped = False
    with spawned(workers, _start_worker, num_started, threads, kernels, health) as pool:
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
    num_started: Any, threads: int, kernels: ops.Kernels, health: HealthSection
) -> None:
    take_device(num_started)
    torch.set_num_threads(threads)
    ops.choose_kernels(kernels)
    # A world of its own, not at the address where the pool's maker listens.
    os.environ.pop("MASTER_PORT", None)
    _start_watching(health)


def take_device(num_started: Any) -> None:
    """Spread the processes of a pool over the GPUs; `num_started`: a Value that they share."""
    with num_started.get_lock():
        number = num_started.value
        num_started.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _print_stopped(spec: RunSpec, reason: Stopped) -> None:
    if dist.rank() == 0:
        print(f"{spec.directory}: {reason}; the same command continues", flush=True)


def _print_result(spec: RunSpec, result: dict[str, Any]) -> None:
    if dist.rank() > 0:
        return
    best, majority = result["best"], result["majority"]
    Console(highlight=False, soft_wrap=True).print(
        f"{spec.directory}: dev accuracy {best['accuracy']:.2%} and macro F1 {best['f1']:.2%} "
        f"in epoch {best['epoch']}; always the commonest label: {majority['accuracy']:.2%} and "
        f"{majority['f1']:.2%}"
    )


def _keep_best(directory: Path, specs: list[RunSpec]) -> None:
    """Point DIRECTORY/best at the best run and delete the other models, once all runs are done."""
    if dist.rank() > 0:
        return
    done = [r.directory for r in specs if (r.directory / run.RESULT).is_file()]
    if len(done) < len(specs):
        print(
            f"{len(done)} of {len(specs)} runs in {directory} are done; the job of the array "
            "that ends last chooses the best"
        )
        return
    results = {
        run_dir: json.loads((run_dir / run.RESULT).read_text(encoding="utf-8")) for run_dir in done
    }
    by_settings: dict[str, list[Path]] = {}
    for run_dir, result in results.items():
        settings = json.dumps({**result["recipe"], "seed": None})
        by_settings.setdefault(settings, []).append(run_dir)

    def accuracy(run_dir: Path) -> float:
        return results[run_dir]["best"]["accuracy"]

    winners = max(by_settings.values(), key=lambda runs: sum(map(accuracy, runs)) / len(runs))
    best = max(winners, key=accuracy)
    for run_dir in results:
        if run_dir != best:
            shutil.rmtree(run_dir / "model", ignore_errors=True)
    # Two jobs may end at once; they choose the same one.
    link = directory / f".{BEST}-{socket.gethostname()}-{os.getpid()}"
    link.symlink_to(best.name)
    link.replace(directory / BEST)
    print(f"best: {directory / BEST / 'model'} ({best.name})")


def main(argv: list[str]) -> None:
    """What `clue-ds launch` starts on every rank."""
    import tyro

    tyro.cli(finetune, prog="clue-ds finetune", args=argv, use_underscores=False)


if __name__ == "__main__":
    sys.exit(run_command("clue-ds finetune", lambda: main(sys.argv[1:])))
