"""Classification of one text, or of a pair of texts: the label is one of the task's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.tasks import features, records
from clue_ds.tasks.features import Features, Text
from clue_ds.tasks.heads import BertForSequenceClassification
from clue_ds.tasks.kinds import answer_lines, measures
from clue_ds.tasks.kinds.base import Answer, Example, Kind, Scores, TaskFile, refuse_repeated
from clue_ds.tasks.kinds.measures import MAJORITY
from clue_ds.tasks.task import SMALL_MODEL_EPOCHS, SMALL_MODEL_LR, Record, Settings, Task


class CustomTask(TaskFile):
    """The keys of a YAML file that describes a user's own task."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # labels may be numbers

    text: list[str] = Field(min_length=1, max_length=2)
    labels: list[str] = Field(min_length=2)
    label: str = "label"
    skip: list[str] = []
    label_name: str | None = None
    max_length: int = Field(Settings.max_length, ge=8)
    batch_size: int = Field(Settings.batch_size, ge=1)
    lr: float | None = Field(None, gt=0)
    epochs: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_labels(self) -> CustomTask:
        refuse_repeated(self.labels)
        return self


class Classify(Kind):
    """The kinds `single` and `pair`."""

    architecture = "BertForSequenceClassification"
    columns = (("accuracy", "accuracy"), ("f1", "macro F1"))
    keys = CustomTask
    usual_fields = ("text",)

    @classmethod
    def custom(cls, given: CustomTask, path: Path) -> Task:
        plain, small = (
            Settings(given.max_length, given.batch_size, given.lr or lr, given.epochs or epochs)
            for lr, epochs in (
                (Settings.lr, Settings.epochs),
                (SMALL_MODEL_LR, SMALL_MODEL_EPOCHS),
            )
        )
        return Task(
            given.name,
            "pair" if len(given.text) == 2 else "single",
            tuple(given.text),
            tuple(given.labels),
            plain,
            small,
            label_field=given.label,
            skipped_labels=frozenset(given.skip),
            name_field=given.label_name,
        )

    def text(self, record: Record, where: str) -> Text:
        self.require(record, where)
        try:
            text = self.task.text(record)
        except (KeyError, TypeError, ValueError) as error:
            fields = " and ".join(self.task.fields)
            raise UserError(
                f"{where}: {fields} can't be read for {self.task.name}: {error!r}"
            ) from None
        return records.checked(text, where)

    @property
    def num_texts(self) -> int:
        if self.task.build is not None:
            return 0
        return 2 if self.task.kind == "pair" else 1

    def plain(self, texts: Sequence[str], where: str) -> Text:
        return records.checked(texts[0] if len(texts) == 1 else (texts[0], texts[1]), where)

    def label(self, record: Record, text: Any, where: str, notes: Counter[str]) -> str | None:
        task = self.task
        if task.label_field not in record:
            raise UserError(
                f"{where}: no field {task.label_field!r} (has {', '.join(record)}); "
                "a file without labels is only good for clue-ds predict"
            )
        label = records.label_text(record[task.label_field], where)
        if label in task.skipped_labels:
            return None
        if label not in task.labels:
            few = ", ".join(task.labels[:20]) + (", ..." if len(task.labels) > 20 else "")
            raise UserError(f"{where}: label {label!r} is not one of {task.name}'s: {few}")
        return label

    def example(
        self, record: Record, number: int, where: str, labelled: bool, notes: Counter[str]
    ) -> Example | None:
        # The label first: a line that is left out may have no text.
        label = self.label(record, None, where, notes) if labelled else None
        if labelled and label is None:
            return None
        text = self.text(record, where)
        return Example(self.id_of(record, number, where), text, label)

    def hub_record(self, record: Record, features: Any) -> Record:
        """The record with its label by name: the hub's class numbers have another order than ours.

        The number -1 means that there is no label.
        """
        name = self.task.label_field
        number = record[name]
        none = next(iter(self.task.skipped_labels), "-")
        return {**record, name: features[name].names[number] if number >= 0 else none}

    def encode(self, tokenizer: Tokenizer, text: Text, max_length: int) -> list[Features]:
        return [features.encode(tokenizer, text, max_length)]

    def targets(self, text: Text, label: str, units: Sequence[Features]) -> list[int]:
        return [self.task.labels.index(label)]

    def network(self, config: ModelConfig, seed: int) -> BertForSequenceClassification:
        return BertForSequenceClassification(config, len(self.task.labels), seed)

    def loss(self, outputs: Tensor, units: Sequence[Features], targets: Sequence[int]) -> Tensor:
        classes = torch.tensor(targets, device=outputs.device)
        return F.cross_entropy(outputs.float(), classes)

    def raw(self, outputs: Tensor, units: Sequence[Features]) -> list[np.ndarray]:
        """The logits [C] of each text."""
        return list(outputs.float().cpu().numpy())

    def answer(self, text: Text, units: Sequence[Features], raws: Sequence[np.ndarray]) -> Answer:
        (logits,) = raws
        labels = self.task.labels
        probabilities = torch.from_numpy(logits).softmax(-1).tolist()
        named = dict(zip(labels, probabilities, strict=True))
        label = labels[int(np.argmax(logits))]
        return Answer(label, {"label": label, "probabilities": named})

    def shown(self, text: Text) -> str:
        return repr(text)

    def _ids(self, labels: Sequence[str]) -> list[int]:
        ids = {label: i for i, label in enumerate(self.task.labels)}
        return [ids[label] for label in labels]

    def scores(self, examples: Sequence[Example], values: Sequence[str]) -> Scores:
        truth = self._ids([str(e.label) for e in examples])
        return measures.scores(truth, self._ids(values), len(self.task.labels))

    def baselines(self, train: Sequence[Example], dev: Sequence[Example]) -> dict[str, Scores]:
        train_ids, dev_ids = (self._ids([str(e.label) for e in part]) for part in (train, dev))
        return {MAJORITY: measures.majority(train_ids, dev_ids, len(self.task.labels))}

    def result(
        self, train: Sequence[Example], dev: Sequence[Example], values: Sequence[str]
    ) -> dict[str, Any]:
        truth = self._ids([str(e.label) for e in dev])
        counts = measures.confusion(truth, self._ids(values), len(self.task.labels))
        return {
            "majority": self.baselines(train, dev)[MAJORITY],
            "f1_of_classes": measures.f1_of_classes(counts).tolist(),
            "confusion": counts.tolist(),
        }

    def submission(self, examples: Sequence[Example], values: Sequence[str]) -> str:
        # In CLUE's samples only TNEWS has label_desc, and it may be empty.
        extra = {"label_desc": ""} if self.task.name == "tnews" else {}
        ids = [e.id for e in examples] if self.task.id_field else range(len(values))
        return "".join(
            json.dumps({"id": one, "label": label, **extra}) + "\n"
            for one, label in zip(ids, values, strict=True)
        )

    def check(
        self, content: bytes, examples: Sequence[Example], where: str, is_scored: bool
    ) -> tuple[list[Any], list[str]]:
        ids = [example.id for example in examples]
        return answer_lines.check(content, ids, where, is_scored, self._wrong_label)

    def _wrong_label(self, number: int, label: Any) -> str | None:
        """What is wrong with the label on a line."""
        name = self.task.name
        if isinstance(label, str):
            return None if label in self.task.labels else f"label {label!r} is not one of {name}'s"
        given = json.dumps(label, ensure_ascii=False)[:40]
        if label is None or isinstance(label, list | dict):
            return f"label {given} must be a string, one of {name}'s labels"
        meant = records.label_text(label, "") if isinstance(label, int) else given
        return f'label {given} must be a string: write "label": "{meant}"'
