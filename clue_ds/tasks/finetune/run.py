"""One fine-tuning run in its directory, which records everything about it and can be continued.

    run.json       what to do: task, recipe, hashes of model and data, versions
    epochs.jsonl   one line per epoch
    state/         the states to resume from, while the run trains (state.py)
    tensorboard/   the loss of every step, and the figures of every epoch
    .lock          keeps other processes out, while this one works here
    result.json    scores, confusion matrix, versions; written last
    model/         the best epoch, for `clue-ds predict` and transformers
    confusion.png  a plot, if matplotlib is installed

Guarantees: the same run in the same directory continues it, or finds that it is finished; a
different run is refused, so that no directory mixes two. request.py has what makes two runs the
same, directory.py what happens to the directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar

from clue_ds import dist, files
from clue_ds.checkpoint import room
from clue_ds.errors import UserError
from clue_ds.export import OpenedModel
from clue_ds.export.sources import opened
from clue_ds.job import watchdog
from clue_ds.tasks import examples, hub_data, kinds, outputs, registry
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.finetune import directory, fit, request
from clue_ds.tasks.finetune.directory import EPOCHS, RESULT, STATE
from clue_ds.tasks.finetune.loop import Outcome, Recipe
from clue_ds.tasks.finetune.progress import Progress
from clue_ds.tasks.finetune.state import States
from clue_ds.tasks.kinds import Example, Kind
from clue_ds.tasks.task import Split, Task


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
    kernels: str = "torch"  # the choice that the process was given, for the record


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
    kind = kinds.of(task)
    train, dev = (read(task, spec.data, split) for split in ("train", "dev"))
    _print_notes(task, train, dev)
    kept = _limited(train, spec.limit)
    with opened(spec.model) as source, contextlib.ExitStack() as held:
        recipe = recipe_for(task, source, spec.changes)
        run_json = request.run_json(
            spec.model,
            task,
            recipe,
            {"train": train, "dev": dev},
            source,
            _test_versions(task, spec.data),
            spec.from_scratch,
            spec.limit,
            spec.kernels,
        )
        done, states = _prepare(spec, run_json, source, held)
        if done is not None:
            return done
        began = time.perf_counter()
        data = {"train": train.sha256, "dev": dev.sha256}
        names = train.names | dev.names
        outcome = _fit(spec, kind, recipe, source, kept, dev, data, names, states, show)
        seconds = time.perf_counter() - began
        with watch.section("save"):
            result = _result(run_json, kind, kept, dev, outcome, seconds)
            if dist.rank() == 0:
                _finish(spec.directory, result)
            dist.barrier()
    return result


def state_bytes(source: OpenedModel) -> int:
    """About the size of a state: fp32 weights, two moments and the best epoch's weights."""
    return 16 * sum(tensor.numel() for tensor in source.state_dict.values())


def _prepare(
    spec: RunSpec, run_json: dict[str, Any], source: OpenedModel, held: contextlib.ExitStack
) -> tuple[dict[str, Any] | None, States]:
    """(the result if the run is finished, its states). `held` keeps the directory's lock.

    Rank 0 prepares the directory and decides for all ranks.
    """
    message, done, states = None, None, States(spec.directory / STATE)
    if dist.rank() == 0:
        try:
            held.enter_context(directory.locked(spec.directory))
            with outputs.explained(spec.directory, "give another --output"):
                notes, done, states = directory.prepare(spec.directory, run_json, spec.force)
            if done is None:
                notes += room.prepare_folder(states.folder, state_bytes(source))
            for note in notes:
                print(f"clue-ds finetune: {note}", file=sys.stderr, flush=True)
        except UserError as error:
            message = str(error)
    message, done, states = dist.broadcast((message, done, states))
    if message is not None:
        raise UserError(message)
    return done, states


def _print_notes(task: Task, *read: Examples) -> None:
    """Say what was corrected in the data, and how often."""
    if dist.rank() > 0:
        return
    for one in read:
        for note, count in one.notes.items():
            print(f"clue-ds finetune: {task.name}, {one.path.name}: {count:,} {note}", flush=True)


def _limited(train: Examples, limit: int | None) -> list[Example]:
    """All examples, or `limit` of them; the choice does not depend on the run's seed."""
    if limit is None or limit >= len(train):
        return train
    return random.Random(0).sample(train, limit)


def _test_versions(task: Task, data: str) -> dict[str, str]:
    """SHA-256 of each version of the test set in the data directory."""
    if data == "hub":
        return {}
    found = examples.test_files(task, Path(data))
    return {version: files.sha256(path) for version, path in found.items()}


def _fit(
    spec: RunSpec,
    kind: Kind,
    recipe: Recipe,
    source: OpenedModel,
    train: list[Example],
    dev: Examples,
    data: dict[str, str],
    names: dict[str, str],
    states: States,
    show: bool,
) -> Outcome:
    place, task = spec.directory, kind.task
    console = Console(quiet=not show or dist.rank() > 0, highlight=False)

    disabled = not console.is_terminal
    with (
        Bar(console=console, transient=True, disable=disabled) as bar,
        contextlib.closing(Progress(task.name, place, console, bar)) as progress,
    ):

        def on_step(step: int, num_steps: int, loss: float) -> None:
            if dist.rank() == 0:
                progress.step(step, num_steps, loss, recipe.epochs)

        def on_epoch(line: dict[str, Any]) -> None:
            _write_epochs(place / EPOCHS, line)
            progress.epoch(line)
            scores = "  ".join(f"{title} {line[key]:.2%}" for key, title in kind.columns)
            console.print(
                f"{task.name}  epoch {line['epoch']:g}/{recipe.epochs}  loss {line['loss']:.4f}  "
                f"dev {scores}"
            )

        return fit.fit_source(
            source,
            kind,
            train,
            dev,
            recipe,
            name=spec.model,
            output=place / "model",
            task=task.name,
            from_scratch=spec.from_scratch,
            force=True,
            names=names,
            data=data,
            states=states,
            on_step=on_step,
            on_epoch=on_epoch,
        )


def _write_epochs(path: Path, line: dict[str, Any]) -> None:
    """Add an epoch's line, or replace it: after a kill the file may already have it."""
    if dist.rank() > 0:
        return
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [one for one in lines if json.loads(one)["step"] < line["step"]]
    outputs.write_text(path, "\n".join([*kept, json.dumps(line)]) + "\n")


def _result(
    run_json: dict[str, Any],
    kind: Kind,
    train: list[Example],
    dev: Examples,
    outcome: Outcome,
    seconds: float,
) -> dict[str, Any]:
    return {
        **run_json,
        "num_trained_on": len(train),
        "best": outcome.best,
        "columns": [list(column) for column in kind.columns],
        "baselines": kind.baselines(train, dev),
        "epochs": outcome.epochs,
        "losses": outcome.losses,
        "label_names": dev.names,
        **kind.result(train, dev, outcome.values),
        "seconds": seconds,
    }


def _finish(place: Path, result: dict[str, Any]) -> None:
    if "confusion" in result and importlib.util.find_spec("matplotlib") is not None:
        from clue_ds.tasks.finetune import plots

        with outputs.explained(place):
            plots.confusion(result, place / "confusion.png")
    with outputs.explained(place):
        files.write_json(place / RESULT, result)
        shutil.rmtree(place / STATE)
