"""The kinds of tasks: how a record becomes inputs, the head, the loss, the answer, the metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clue_ds.model.finetuned import ENTITY_POINTER
from clue_ds.tasks.kinds.base import Answer, Example, Kind
from clue_ds.tasks.kinds.choice import Choice
from clue_ds.tasks.kinds.classify import Classify
from clue_ds.tasks.kinds.cloze import Cloze
from clue_ds.tasks.kinds.span.kind import Span
from clue_ds.tasks.kinds.tag.kind import Tag
from clue_ds.tasks.task import KindName, Task

__all__ = ["KINDS", "Answer", "Example", "Kind", "of", "unnamed_task"]

KINDS: dict[KindName, type[Kind]] = {
    "single": Classify,
    "pair": Classify,
    "span": Span,
    "choice": Choice,
    "cloze": Cloze,
    "tag": Tag,
}
# What a YAML file calls a kind -> the kind. A classification task is of one text or of two.
CUSTOM_KINDS: dict[str, KindName] = {
    "classify": "single",
    "span": "span",
    "choice": "choice",
    "cloze": "cloze",
    "tag": "tag",
}
# Class of transformers -> the kind of a model that doesn't say what it was fine-tuned for.
BY_ARCHITECTURE: dict[str, KindName] = {
    Classify.architecture: "single",
    Span.architecture: "span",
    Choice.architecture: "choice",
    Tag.architecture: "tag",
    ENTITY_POINTER: "tag",
}


def of(task: Task) -> Kind:
    """What the task's kind does with it."""
    return KINDS[task.kind](task)


def unnamed_task(
    architecture: str, name: str, trained_with: Mapping[str, Any] | None = None
) -> Task:
    """A task for a model from elsewhere, or one that was fine-tuned for a user's own task.

    `trained_with`: the options of that task.
    """
    kind = BY_ARCHITECTURE.get(architecture, "single")
    options = {"head": "pointer"} if architecture == ENTITY_POINTER else {}
    return Task(
        name, kind, KINDS[kind].usual_fields, (), options={**(trained_with or {}), **options}
    )
