"""The table of kinds, and the task of a model that says what it was fine-tuned for."""

from __future__ import annotations

from typing import Any

from clue_ds.errors import UserError
from clue_ds.model.finetuned import ENTITY_POINTER, FineTuned
from clue_ds.tasks.kinds.base import Kind
from clue_ds.tasks.kinds.choice import Choice
from clue_ds.tasks.kinds.classify import Classify
from clue_ds.tasks.kinds.cloze import Cloze
from clue_ds.tasks.kinds.span.kind import Span
from clue_ds.tasks.kinds.tag.kind import Tag
from clue_ds.tasks.task import KindName, Task

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


def reads(task: Task) -> dict[str, Any]:
    """What the model of a user's own task carries, so that `trained_task` makes the task of it."""
    return {"kind": task.kind, "fields": list(task.fields), "label": task.label_field}


def trained_task(about: FineTuned) -> Task | None:
    """The user's own task that a model was fine-tuned for, if the model says what it reads."""
    if not about.reads:
        return None
    kind = about.reads["kind"]
    if kind not in KINDS:
        raise UserError(
            f"the model's config.json says that its task is of the kind {kind!r}, which this "
            f"version of clue_ds does not have (it has {', '.join(KINDS)}); install a newer one, "
            "or give the task's YAML file with --task"
        )
    return Task(
        about.task or "",
        kind,
        tuple(about.reads["fields"]),
        about.labels,
        label_field=about.reads["label"],
        options=about.options,
    )


def unnamed_task(about: FineTuned) -> Task:
    """A task for a model from elsewhere, or one that does not say what its task reads."""
    kind = BY_ARCHITECTURE.get(about.architecture, "single")
    options = {"head": "pointer"} if about.architecture == ENTITY_POINTER else {}
    return Task(
        about.task or "",
        kind,
        KINDS[kind].usual_fields,
        (),
        options={**about.options, **options},
    )
