"""Multiple choice: which of several choices answers a question about a text (C3).

    {"text": ["line", ...], "question": "...", "choice": ["...", ...], "answer": "..."}

An example may have 2 to 10 choices, each with a sequence of its own: [CLS] text [SEP] question
[SEP] choice [SEP]. When it is too long, the longest of its three parts loses tokens first. Choices
may be equal: then the first of them stands for all.

CLUE's files of C3 are one JSON array: [[lines], [{question, choice, answer}, ...], id].
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field
from torch import Tensor

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.tasks import features, lines, records
from clue_ds.tasks.heads import BertForMultipleChoice
from clue_ds.tasks.kinds import answer_lines, rating
from clue_ds.tasks.kinds.base import Answer, Example, Kind, Scores, TaskFile
from clue_ds.tasks.kinds.rating import Rivals
from clue_ds.tasks.task import Record, Settings, Task

FEWEST, MOST = 2, 10  # choices
CHANCE, LONGEST = "guessing", "always choosing the longest choice"
LETTERS = "ABCDEFGHIJ"


class Question(NamedTuple):
    """What is asked, about which text, and the possible answers."""

    context: str
    question: str | None
    choices: tuple[str, ...]


class CustomChoice(TaskFile):
    """The keys of a YAML file that describes a user's own task of multiple choice."""

    text: str = "text"
    question: str | None = None
    choices: str = "choices"
    label: str = "answer"
    max_length: int = Field(512, ge=16)
    batch_size: int = Field(24, ge=1)
    lr: float | None = Field(None, gt=0)
    epochs: int = Field(8, ge=1)


class Choice(Kind):
    """The kind `choice`; `task.fields`: the text, the question (if there is one), the choices."""

    architecture = "BertForMultipleChoice"
    columns = (("accuracy", "accuracy"),)
    keys = CustomChoice
    usual_fields = ("text", "question", "choice")
    has_labels = False

    @classmethod
    def custom(cls, given: CustomChoice, path: Path) -> Task:
        fields = [given.text, *([given.question] if given.question else []), given.choices]
        plain, small = (
            Settings(given.max_length, given.batch_size, given.lr or lr, given.epochs)
            for lr in (2e-5, 5e-5)
        )
        return Task(given.name, "choice", tuple(fields), (), plain, small, label_field=given.label)

    # ------------------------------------------------------------------------------- reading

    def records(self, path: Path) -> Iterator[tuple[str, Record]]:
        if path.suffix in (".json", ".jsonl") and lines.begins_with(path, "["):
            return self._c3_records(path)
        return super().records(path)

    def _c3_records(self, path: Path) -> Iterator[tuple[str, Record]]:
        passages = lines.json_file(path)
        for number, passage in enumerate(passages, start=1):
            where = f"{path}: passage {number}"
            if not isinstance(passage, list) or len(passage) < 2:
                raise UserError(
                    f"{where} must be a list [[lines of text], [questions], id]; give C3's own "
                    "file, or one JSON object per line"
                )
            questions = passage[1]
            if not isinstance(questions, list) or not questions:
                raise UserError(f"{where} has no list of questions after its lines; give it one")
            for place, question in enumerate(questions, start=1):
                if not isinstance(question, dict):
                    raise UserError(f"{where}, question {place} must be a JSON object")
                yield f"{where}, question {place}", {"text": passage[0], **question}

    def hub_record(self, record: Record, features: Any) -> Record:
        """The row of C3 on the hub, with its `context` under our name."""
        return {"text": record["context"], **record}

    def text(self, record: Record, where: str) -> Question:
        self.require(record, where)
        fields = self.task.fields
        context = record[fields[0]]
        if isinstance(context, list) and all(isinstance(line, str) for line in context):
            context = "\n".join(context)
        context = records.checked_one(context, f"{where}: {fields[0]}")
        question = None
        if len(fields) == 3:
            question = records.checked_one(record[fields[1]], f"{where}: {fields[1]}")
        return Question(context, question, self._choices(record[fields[-1]], where))

    def _choices(self, given: Any, where: str) -> tuple[str, ...]:
        name = self.task.fields[-1]
        if isinstance(given, str):  # a cell of a table
            given = [one.strip() for one in given.split("|")]
        if not isinstance(given, list):
            raise UserError(f"{where}: {name} must be a list of texts, not {given!r:.40}")
        if not FEWEST <= len(given) <= MOST:
            raise UserError(
                f"{where}: {len(given)} choices in {name}, but a question has {FEWEST} to {MOST}; "
                "remove the question, or split it"
            )
        return tuple(
            records.checked_one(one, f"{where}: {name}, choice {number}")
            for number, one in enumerate(given)
        )

    def label(self, record: Record, text: Question, where: str, notes: Counter[str]) -> int:
        """The index of the answer: it is given as the choice's text, its index, or its letter."""
        name = self.task.label_field
        if name not in record:
            raise UserError(
                f"{where}: no field {name!r} (has {', '.join(record)}); a file without answers is "
                "only good for clue-ds predict"
            )
        given = record[name]
        if isinstance(given, str) and given in text.choices:
            return text.choices.index(given)
        if isinstance(given, str) and given.strip() in text.choices:
            return text.choices.index(given.strip())
        index = LETTERS.find(given) if isinstance(given, str) and len(given) == 1 else given
        is_index = isinstance(index, int) and not isinstance(index, bool)
        if is_index and 0 <= index < len(text.choices):
            return text.choices.index(text.choices[index])
        raise UserError(
            f"{where}: {name} {given!r:.60} is not one of the {len(text.choices)} choices; give "
            "the text of the right choice, its letter, or its index from 0"
        )

    # -------------------------------------------------------------------------------- inputs

    def encode(self, tokenizer: Tokenizer, text: Question, max_length: int) -> list[Rivals]:
        before = [tokenizer.encode(part) for part in text[:2] if part is not None]
        rows = [
            features.assemble(tokenizer, [*before, tokenizer.encode(choice)], max_length)
            for choice in text.choices
        ]
        return [Rivals(tuple(rows))]

    def targets(self, text: Question, label: int, units: Sequence[Rivals]) -> list[int]:
        return [label]

    def network(self, config: ModelConfig, seed: int) -> BertForMultipleChoice:
        return BertForMultipleChoice(config, seed)

    def loss(self, outputs: Tensor, units: Sequence[Rivals], targets: Sequence[int]) -> Tensor:
        return rating.loss(outputs, units, targets)

    # ------------------------------------------------------------------------------- answers

    def raw(self, outputs: Tensor, units: Sequence[Rivals]) -> list[np.ndarray]:
        return rating.ratings(outputs, units)

    def answer(self, text: Question, units: Sequence[Rivals], raws: Sequence[np.ndarray]) -> Answer:
        (rated,) = raws
        # Equal choices have equal ratings up to rounding; the first stands for all.
        choice = text.choices[int(np.argmax(rated))]
        index = text.choices.index(choice)
        chances = rating.probabilities(rated)
        return Answer(index, {"label": index, "choice": choice, "probabilities": chances})

    def shown(self, text: Question) -> str:
        return repr((text.question or text.context)[:40])

    # -------------------------------------------------------------------------------- scores

    def scores(self, examples: Sequence[Example], values: Sequence[int]) -> Scores:
        right = [e.label == value for e, value in zip(examples, values, strict=True)]
        return {"accuracy": sum(right) / len(right)}

    def baselines(self, train: Sequence[Example], dev: Sequence[Example]) -> dict[str, Scores]:
        longest = [max(e.text.choices, key=len) for e in dev]
        values = [e.text.choices.index(one) for e, one in zip(dev, longest, strict=True)]
        # Among equal choices each is right.
        chances = [
            e.text.choices.count(e.text.choices[e.label]) / len(e.text.choices)  # type: ignore
            for e in dev
        ]
        return {CHANCE: {"accuracy": sum(chances) / len(dev)}, LONGEST: self.scores(dev, values)}

    # ----------------------------------------------------------------------------- submission

    def submission(self, examples: Sequence[Example], values: Sequence[int]) -> str:
        return "".join(
            json.dumps({"id": number, "label": value}) + "\n" for number, value in enumerate(values)
        )

    def check(
        self, content: bytes, examples: Sequence[Example], where: str, is_scored: bool
    ) -> tuple[list[Any], list[str]]:
        def wrong(number: int, label: Any) -> str | None:
            count = len(examples[number].text.choices) if number < len(examples) else MOST
            if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < count:
                return None
            shown = json.dumps(label, ensure_ascii=False)[:40]
            return f"label {shown} must be the index of one of the {count} choices, from 0"

        ids = [example.id for example in examples]
        return answer_lines.check(content, ids, where, is_scored, wrong)
