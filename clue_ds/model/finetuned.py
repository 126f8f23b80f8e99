"""What a fine-tuned model carries beside its weights, and where its config.json keeps it.

    architectures                    which classifier it is
    id2label, label2id, num_labels   the classes as people read them ("news_tech"); transformers
                                     before 4 takes the number of classes from num_labels only
    finetuning_task                  the task that it was fine-tuned for
    clue_ds                          labels: the classes as the task's files write them ("109"),
                                     where they differ; max_length: the most tokens of a text in
                                     training; base: the model it started from, or with
                                     from_scratch the one whose shape it has; recipe, dev: its
                                     settings and scores; options: what tasks of its kind can
                                     set (a stride); reads: of a user's own task, the kind and
                                     the fields of its records; data: SHA-256 of the data's files;
                                     examples: how many were trained on, and how many are in dev

Guarantees: every layout that is written carries all of it; a value of another type is one message
that names the file and the key; labels are distinct, so that none hides another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clue_ds.errors import UserError

SEQUENCE = "BertForSequenceClassification"
TOKENS = "BertForTokenClassification"
MULTIPLE_CHOICE = "BertForMultipleChoice"
QUESTION_ANSWERING = "BertForQuestionAnswering"
ENTITY_POINTER = "BertForEntityPointer"  # ours; transformers has no such class
# What a fine-tuned model can be.
ARCHITECTURES = (
    SEQUENCE,
    TOKENS,
    MULTIPLE_CHOICE,
    QUESTION_ANSWERING,
    ENTITY_POINTER,
)
UNLABELLED = (MULTIPLE_CHOICE, QUESTION_ANSWERING)  # their heads have no classes
SINGLE_LABEL = "single_label_classification"
OWN_KEY = "clue_ds"


@dataclass(frozen=True)
class FineTuned:
    """Labels in the order of their ids, and how the model was trained and measured."""

    labels: tuple[str, ...]  # as the task's files write them; empty: its head has no classes
    names: tuple[str, ...] = ()  # as people read them, in the same order; empty: as the labels
    task: str | None = None
    max_length: int | None = None  # most tokens of a text in training, special ones included
    architecture: str = SEQUENCE
    problem_type: str | None = None  # transformers' name for what the logits mean
    base: str | None = None  # the model that fine-tuning started from
    from_scratch: bool = False  # only base's shape and vocabulary were taken
    recipe: Mapping[str, Any] = field(default_factory=dict)  # the settings of the run
    dev: Mapping[str, Any] = field(default_factory=dict)  # the scores of the best epoch
    options: Mapping[str, Any] = field(default_factory=dict)  # of a task of its kind (Task.options)
    # Of a user's own task, so that its file is not needed again: kind, fields, label (a field).
    reads: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)  # split -> SHA-256 of its file
    # Split -> number of examples trained on, or of those in dev, the unlabelled ones included.
    examples: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> tuple[str, ...]:
        """The classes as people read them."""
        return self.names or self.labels

    def config_values(self) -> dict[str, Any]:
        """The keys of config.json that hold all of this."""
        values: dict[str, Any] = {"architectures": [self.architecture]}
        if self.labels:
            values["id2label"] = {str(i): name for i, name in enumerate(self.shown)}
            values["label2id"] = {name: i for i, name in enumerate(self.shown)}
            values["num_labels"] = len(self.labels)
        if self.problem_type is not None:
            values["problem_type"] = self.problem_type
        if self.task is not None:
            values["finetuning_task"] = self.task
        own = {
            "labels": list(self.labels) if self.shown != self.labels else None,
            "max_length": self.max_length,
            "base": self.base,
            "recipe": dict(self.recipe),
            "dev": dict(self.dev),
            "options": dict(self.options),
            "reads": dict(self.reads),
            "data": dict(self.data),
            "from_scratch": self.from_scratch,
            "examples": dict(self.examples),
        }
        own = {key: value for key, value in own.items() if value}
        return values | ({OWN_KEY: own} if own else {})


def describe(
    labels: Sequence[str],
    names: Mapping[str, str] | None = None,
    architecture: str = SEQUENCE,
    **about: Any,
) -> FineTuned:
    """What a model that was fine-tuned here carries.

    `names`: label -> its name for people. They are used if all labels have one and no two have the
    same. `about`: the other fields of FineTuned.
    """
    shown = tuple((names or {}).get(label, "") for label in labels)
    is_complete = all(shown) and len(set(shown)) == len(shown)
    differs = is_complete and shown != tuple(labels)
    return FineTuned(
        tuple(labels),
        shown if differs else (),
        architecture=architecture,
        problem_type=SINGLE_LABEL if architecture == SEQUENCE else None,
        **about,
    )


def unnamed(num_classes: int) -> tuple[str, ...]:
    """The labels that transformers gives to classes without names."""
    return tuple(f"LABEL_{i}" for i in range(num_classes))


def read(values: Mapping[str, Any], num_classes: int, path: Path) -> FineTuned:
    """What the config.json at `path`, with the content `values`, says of `num_classes` classes.

    The heads of `UNLABELLED` have none.
    """
    own = _object(values, OWN_KEY, path)
    architectures = values.get("architectures")
    known = [one for one in architectures if one in ARCHITECTURES] if architectures else []
    if known and known[0] in UNLABELLED:
        num_classes = 0
    said = _object(values, "id2label", path)
    names = _distinct([str(said.get(str(i), f"LABEL_{i}")) for i in range(num_classes)])
    labels = own.get("labels", list(names))
    is_list = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not is_list or len(set(labels)) != num_classes:
        raise UserError(
            f"{path}: {OWN_KEY}.labels must be a list of {num_classes} different labels, one for "
            "each class of the weights; correct it, or copy the file again"
        )
    max_length = own.get("max_length")
    if max_length is not None and (type(max_length) is not int or max_length < 4):
        raise UserError(
            f"{path}: {OWN_KEY}.max_length is {max_length!r:.60}; it must be an integer of at "
            "least 4; correct it, or copy the file again"
        )
    return FineTuned(
        labels=tuple(labels),
        names=names if names != tuple(labels) else (),
        task=values.get("finetuning_task"),
        max_length=max_length,
        architecture=known[0] if known else SEQUENCE if num_classes else QUESTION_ANSWERING,
        problem_type=values.get("problem_type"),
        base=None if own.get("base") is None else str(own["base"]),
        recipe=_object(own, "recipe", path),
        dev=_object(own, "dev", path),
        options=_object(own, "options", path),
        reads=_reads(own, path),
        data=_object(own, "data", path),
        from_scratch=own.get("from_scratch") is True,
        examples=_object(own, "examples", path),
    )


def check_types(values: Mapping[str, Any], path: Path) -> None:
    """UserError unless the keys of a config.json that say what a classifier is have their types."""
    if not isinstance(values.get("id2label") or {}, dict):
        raise UserError(f"{path}: id2label must be an object of ids and labels; correct it")
    if not isinstance(values.get("finetuning_task") or "", str):
        raise UserError(f"{path}: finetuning_task must be the name of a task; correct it")
    if not isinstance(values.get("problem_type") or "", str):
        raise UserError(f"{path}: problem_type must be a name of transformers; correct it")
    if not isinstance(values.get("architectures") or [], list):
        raise UserError(f"{path}: architectures must be a list of names; correct it")
    _object(values, OWN_KEY, path)


def _object(values: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: {key} must be a JSON object; correct it, or copy the file again")
    return found


def _reads(own: Mapping[str, Any], path: Path) -> dict[str, Any]:
    found = _object(own, "reads", path)
    if not found:
        return found
    fields = found.get("fields")
    is_list = isinstance(fields, list) and fields and all(isinstance(one, str) for one in fields)
    if not is_list or not all(isinstance(found.get(key), str) for key in ("kind", "label")):
        raise UserError(
            f"{path}: {OWN_KEY}.reads must have kind and label, which are texts, and fields, a "
            "list of texts; correct it, or copy the file again"
        )
    return found


def _distinct(names: list[str]) -> tuple[str, ...]:
    """The names, of which those that occur more than once get their id added."""
    counts = Counter(names)
    distinct = [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names)]
    return tuple(distinct) if len(set(distinct)) == len(names) else unnamed(len(names))
