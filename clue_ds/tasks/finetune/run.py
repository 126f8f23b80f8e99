"""One fine-tuning run in its directory, which records everything about it and can be continued.

    run.json       what to do: task, model, recipe, hashes of the data
    epochs.jsonl   one line per epoch
    state.pt       the state to resume from, while the run trains
    result.json    scores, confusion matrix, versions; written last
    model/         the best epoch, for `clue-ds predict` and transformers
    confusion.png  a plot, if matplotlib is installed

Guarantees: the same run in the same directory continues it, or finds that it is finished; a
different run is refused, so that no directory mixes two.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from clue_ds import dist, files
from clue_ds.errors import UserError
from clue_ds.export import OpenedModel
from clue_ds.export.sources import opened
from clue_ds.job import preflight, watchdog
from clue_ds.tasks import examples, hub_data, registry
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.finetune import fit, measures
from clue_ds.tasks.finetune.loop import Outcome, Recipe
from clue_ds.tasks.registry import Split, Task

RUN, EPOCHS, STATE, RESULT = "run.json", "epochs.jsonl", "state.pt", "result.json"


@dataclass(frozen=True)
class RunSpec:
    """What a run is to do. `changes`: fields of Recipe that replace the task's settings."""

    task: str  # a name, or the path of a YAML file
    model: str
    data: str  # a directory, or "hub"
    directory: Path
    changes: dict[str, Any]
    from_scratch: bool = False
    limit: int | None = None  # number of training examples, drawn with seed 0
    force: bool = False  # discard a different run in the directory


def recipe_for(task: Task, source: OpenedModel, changes: dict[str, Any]) -> Recipe:
    """The task's settings for a model of this size, with the user's changes."""
    settings = dataclasses.asdict(task.settings_for(source.config))
    return Recipe(**(settings | changes))


def read(task: Task, data: str, split: Split) -> Examples:
    """The labelled examples of a split, from a directory or from the hub."""
    if data == "hub":
        return hub_data.read(task, split)
    return examples.read(task, examples.find(task, data, split))


def run(spec: RunSpec, show: bool = True) -> dict[str, Any]:
    """Do or continue a run, or read a finished one; return the content of its result.json.

    `show`: print a progress bar and a line per epoch. Raises loop.Stopped when the job was asked
    to stop.
    """
    watch = watchdog.current()
    watch.begin(watch.health)
    task = registry.get(spec.task)
    train, dev = (read(task, spec.data, split) for split in ("train", "dev"))
    kept = _limited(train, spec.limit)
    with opened(spec.model) as source:
        recipe = recipe_for(task, source, spec.changes)
        run_json = _run_json(spec, task, recipe, train, dev)
        # Rank 0 prepares the directory and decides for all ranks.
        message, done = dist.broadcast(_prepare(spec, run_json) if dist.rank() == 0 else None)
        if message is not None:
            raise UserError(message)
        if done is not None:
            return done
        began = time.perf_counter()
        outcome = _fit(spec, task, recipe, source, kept, dev, show)
    seconds = time.perf_counter() - began
    with watch.section("save"):
        result = _result(run_json, task, kept, dev, outcome, seconds)
        if dist.rank() == 0:
            _finish(spec.directory, result)
        dist.barrier()
    return result


def _limited(train: Examples, limit: int | None) -> list[examples.Example]:
    """All examples, or `limit` of them; the choice does not depend on the run's seed."""
    if limit is None or limit >= len(train):
        return train
    return random.Random(0).sample(train, limit)


def _describe_file(read: Examples) -> dict[str, Any]:
    return {
        "file": read.path.name,
        "sha256": read.sha256,
        "num_examples": len(read),
        "num_skipped": read.num_skipped,
    }


def _run_json(
    spec: RunSpec, task: Task, recipe: Recipe, train: Examples, dev: Examples
) -> dict[str, Any]:
    return {
        "task": task.name,
        "labels": list(task.labels),
        "model": spec.model,
        "from_scratch": spec.from_scratch,
        "limit": spec.limit,
        "recipe": dataclasses.asdict(recipe),
        "data": {"train": _describe_file(train), "dev": _describe_file(dev)},
        "test_versions": _test_versions(task, spec.data),
    }


def _test_versions(task: Task, data: str) -> dict[str, str]:
    """SHA-256 of each version of the test set in the data directory."""
    if data == "hub":
        return {}
    found = examples.test_files(task, Path(data))
    return {version: files.sha256(path) for version, path in found.items()}


def _prepare(spec: RunSpec, run_json: dict[str, Any]) -> tuple[str | None, dict[str, Any] | None]:
    """(the error message if the run is refused, the result if it is already finished)."""
    directory = spec.directory
    if (directory / RUN).is_file():
        earlier = json.loads((directory / RUN).read_text(encoding="utf-8"))
        different = [key for key in run_json if earlier.get(key) != run_json[key]]
        trained = any((directory / name).exists() for name in (STATE, RESULT))
        if different and trained and not spec.force:
            return _differs(directory, different, earlier, run_json), None
        if different:
            shutil.rmtree(directory)
        elif (directory / RESULT).is_file():
            return None, json.loads((directory / RESULT).read_text(encoding="utf-8"))
    elif directory.exists() and any(directory.iterdir()):
        return f"{directory} exists and is not a fine-tuning run; choose another --output", None
    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / RUN, run_json)
    return None, None


def _differs(
    directory: Path, keys: list[str], earlier: dict[str, Any], run_json: dict[str, Any]
) -> str:
    details = []
    for key in keys:
        before, now = earlier.get(key), run_json[key]
        if isinstance(now, dict) and isinstance(before, dict):
            details += [f"{key}.{k}" for k in now if before.get(k) != now[k]]
        else:
            details.append(f"{key} ({before!r}, now {now!r})")
    return (
        f"{directory} holds a run that differs in {', '.join(details)}; choose another --output, "
        "or give --force to discard that run"
    )


def _fit(
    spec: RunSpec,
    task: Task,
    recipe: Recipe,
    source: OpenedModel,
    train: list[examples.Example],
    dev: Examples,
    show: bool,
) -> Outcome:
    directory = spec.directory
    console = Console(quiet=not show or dist.rank() > 0, highlight=False)
    (directory / EPOCHS).unlink(missing_ok=True) if not (directory / STATE).exists() else None

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(task.name)

        def on_step(step: int, num_steps: int, loss: float) -> None:
            bar.update(row, completed=step, total=num_steps, description=f"{task.name} {loss:.3f}")

        def on_epoch(line: dict[str, Any]) -> None:
            _write_epochs(directory / EPOCHS, line)
            console.print(
                f"{task.name}  epoch {line['epoch']}/{recipe.epochs}  loss {line['loss']:.4f}  "
                f"dev accuracy {line['accuracy']:.2%}  F1 {line['f1']:.2%}"
            )

        return fit.fit_source(
            source,
            [(e.text, str(e.label)) for e in train],
            [(e.text, str(e.label)) for e in dev],
            task.labels,
            recipe,
            name=spec.model,
            output=directory / "model",
            task=task.name,
            from_scratch=spec.from_scratch,
            force=True,
            state_file=directory / STATE,
            on_step=on_step,
            on_epoch=on_epoch,
        )


def _write_epochs(path: Path, line: dict[str, Any]) -> None:
    """Add an epoch's line, or replace it: after a kill the file may already have it."""
    if dist.rank() > 0:
        return
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = lines[: line["epoch"] - 1]
    files.write_text(path, "\n".join([*kept, json.dumps(line)]) + "\n")


def _result(
    run_json: dict[str, Any],
    task: Task,
    train: list[examples.Example],
    dev: Examples,
    outcome: Outcome,
    seconds: float,
) -> dict[str, Any]:
    ids = {label: i for i, label in enumerate(task.labels)}
    truth = [ids[str(e.label)] for e in dev]
    counts = measures.confusion(truth, outcome.predictions, len(ids))
    majority = measures.majority([ids[str(e.label)] for e in train], truth, len(ids))
    return {
        **run_json,
        "num_trained_on": len(train),
        "best": outcome.best,
        "majority": majority,
        "epochs": outcome.epochs,
        "losses": outcome.losses,
        "label_names": dev.names,
        "f1_of_classes": measures.f1_of_classes(counts).tolist(),
        "confusion": counts.tolist(),
        "seconds": seconds,
        "num_ranks": dist.world_size(),
        "versions": preflight.versions(),
    }


def _finish(directory: Path, result: dict[str, Any]) -> None:
    if importlib.util.find_spec("matplotlib") is not None:
        from clue_ds.tasks.finetune import plots

        plots.confusion(result, directory / "confusion.png")
    files.write_json(directory / RESULT, result)
    (directory / STATE).unlink(missing_ok=True)
