"""What decides the result of a run: model, task, data, settings, versions; written to run.json.

Guarantees: two requests are equal exactly when the same program would compute the same from the
same bytes. The model counts by its weights and vocabulary and not by its path; a task counts by all
its fields. The number of threads is left out: it changes the last bits of a sum, and the runs of
one grid may have different numbers (`--workers`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from clue_ds import dist
from clue_ds.export import OpenedModel
from clue_ds.job import preflight
from clue_ds.model.weights import StateDict
from clue_ds.tasks.examples import Examples
from clue_ds.tasks.finetune.loop import Recipe
from clue_ds.tasks.task import Task
from clue_ds.vocab_file import vocab_lines

# Keys of run.json that are only recorded: where the model was, and the test sets beside the data.
NOT_DECIDING = ("model", "test_versions")
# Keys that earlier versions did not record.
SINCE_HASHES = ("model_content", "task_content", "device", "kernels", "num_ranks", "versions")


def describe_model(source: OpenedModel, from_scratch: bool) -> dict[str, Any]:
    """Hashes of what fine-tuning takes from a model; from random weights that is its shape."""
    words = hashlib.sha256("\n".join(vocab_lines(source.vocab_file)).encode()).hexdigest()
    return {
        "weights": None if from_scratch else weights_hash(source.state_dict),
        "vocabulary": words,
        "lower_case": source.lower_case,
        "config": dataclasses.asdict(source.config),
    }


def weights_hash(state: StateDict) -> str:
    """SHA-256 of the encoder's tensors, whatever file they come from. Heads are not used."""
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith("bert.")):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe_task(task: Task) -> dict[str, Any]:
    """All fields of a task that decide what is read and trained; the settings are the recipe's."""
    described: dict[str, Any] = {
        "kind": task.kind,
        "fields": list(task.fields),
        "label_field": task.label_field,
        "skipped_labels": sorted(task.skipped_labels),
        "name_field": task.name_field,
        "metric": task.metric,
    }
    # Only where they differ from what tasks had before there were kinds, which have the same runs.
    if task.format != "lines":
        described["format"] = task.format
    if task.options:
        described["options"] = dict(task.options)
    if task.evaluations_per_epoch != 1:
        described["evaluations_per_epoch"] = task.evaluations_per_epoch
    return described


def describe_file(read: Examples) -> dict[str, Any]:
    return {
        "file": read.path.name,
        "sha256": read.sha256,
        "num_examples": len(read),
        "num_skipped": read.num_skipped,
    }


def run_json(
    model: str,
    task: Task,
    recipe: Recipe,
    data: dict[str, Examples],
    source: OpenedModel,
    test_versions: dict[str, str],
    from_scratch: bool,
    limit: int | None,
    kernels: str,
) -> dict[str, Any]:
    """The content of run.json. `model`: the path or name that the user gave."""
    device = dist.device().type
    uses_triton = kernels == "triton" or (kernels == "auto" and device == "cuda")
    return {
        "task": task.name,
        "labels": list(task.labels),
        "task_content": describe_task(task),
        "model": model,
        "model_content": describe_model(source, from_scratch),
        "from_scratch": from_scratch,
        "limit": limit,
        "recipe": dataclasses.asdict(recipe),
        "data": {split: describe_file(read) for split, read in data.items()},
        "test_versions": test_versions,
        "device": device,
        "kernels": "triton" if uses_triton else "torch",
        "num_ranks": dist.world_size(),
        "versions": preflight.versions(),
    }


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What decides the result and differs, for the user; what `earlier` lacks is not compared.

    If `earlier` has no hash of the weights, the path of the model is compared instead.
    """
    compared = [key for key in now if key not in NOT_DECIDING]
    if "model_content" not in earlier:
        compared.append("model")
    found: list[str] = []
    for key in compared:
        if key in SINCE_HASHES and key not in earlier:
            continue
        before, after = earlier.get(key), now[key]
        if isinstance(after, dict) and isinstance(before, dict):
            found += [f"{key}.{k}" for k in {**before, **after} if before.get(k) != after.get(k)]
        elif before != after:
            found.append(f"{key} ({before!r}, now {after!r})")
    return [_explained(one) for one in found]


def _explained(difference: str) -> str:
    meanings = {
        "model_content.weights": "the weights of the model",
        "model_content.vocabulary": "the vocabulary of the model",
    }
    return meanings.get(difference, difference)


def is_complete(earlier: dict[str, Any]) -> bool:
    """Whether run.json records all that decides the result; earlier versions did not."""
    return all(key in earlier for key in SINCE_HASHES)
