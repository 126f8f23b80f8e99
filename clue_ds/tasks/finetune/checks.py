"""Before the first of several runs is trained: is everything there that the last one needs?

A command with all tasks takes hours, and a file of the last task that is missing must not be found
by its end. A single run makes the same checks itself when it begins.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from clue_ds import dist, files
from clue_ds.errors import UserError
from clue_ds.export.sources import OpenedModel, opened
from clue_ds.tasks import registry
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.finetune import directory, request, run
from clue_ds.tasks.finetune.directory import RESULT
from clue_ds.tasks.finetune.run import RunSpec

# A parameter of the finished model, which is written in two forms.
MODEL_BYTES = 8
# The newest one, and the one that is being written.
NUM_STATES = 2

Data = dict[str, Examples]


def check(specs: list[RunSpec], workers: int) -> None:
    """One UserError, on every rank, that lists all that is wrong with any of the runs.

    It reads every file of the data, opens every model, compares what is in the directories, and
    looks for room on the disk. Rank 0 does so, and nothing is changed.
    """
    error = None
    if dist.rank() == 0 and len(specs) > 1:
        problems = list(dict.fromkeys(_problems(specs, workers)))
        if problems:
            number = f"{len(problems)} things are wrong" if problems[1:] else "one thing is wrong"
            error = f"nothing was trained, because {number}: {'; '.join(problems)}"
    dist.agree(error)


def _problems(specs: list[RunSpec], workers: int) -> list[str]:
    problems: list[str] = []
    data: dict[str, Data] = {}
    for task in dict.fromkeys(spec.task for spec in specs):
        where = next(spec.data for spec in specs if spec.task == task)
        try:
            found = registry.get(task)
            data[task] = {split: run.read(found, where, split) for split in ("train", "dev")}
        except UserError as error:
            problems.append(f"{task}: {error}")
    for model in dict.fromkeys(spec.model for spec in specs):
        of_model = [spec for spec in specs if spec.model == model and spec.task in data]
        try:
            with opened(model) as source:
                problems += _of_model(source, of_model, data, workers)
        except UserError as error:
            problems.append(str(error))
    return problems


def _of_model(
    source: OpenedModel, specs: list[RunSpec], data: dict[str, Data], workers: int
) -> list[str]:
    """What is wrong with the directories of the runs that start from this model."""
    problems = []
    for spec in specs:
        try:
            if directory.holds(spec.directory) and not spec.force:
                refusal = directory.refusal(spec.directory, _run_json(spec, source, data))
                problems += [refusal] if refusal else []
        except UserError as error:
            problems.append(str(error))
    left = [spec for spec in specs if not (spec.directory / RESULT).exists()]
    if left:
        parameters = sum(tensor.numel() for tensor in source.state_dict.values())
        states = NUM_STATES * run.state_bytes(source) * min(workers, len(left))
        needed = MODEL_BYTES * parameters * len(left) + states
        problems += _no_room(left[0].directory, needed, len(left))
    return problems


def _run_json(spec: RunSpec, source: OpenedModel, data: dict[str, Data]) -> dict[str, object]:
    task = registry.get(spec.task)
    recipe = run.recipe_for(task, source, spec.changes)
    return request.run_json(
        spec.model,
        task,
        recipe,
        data[spec.task],
        source,
        {},
        spec.from_scratch,
        spec.limit,
        spec.kernels,
    )


def _no_room(place: Path, needed: int, number: int) -> list[str]:
    existing = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return []
    return [
        f"{number} runs in {place.parent.parent} need up to {files.size_text(needed)}, but "
        f"{files.size_text(free)} are free there; free some space, or give another --output"
    ]
