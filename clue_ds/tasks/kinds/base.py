"""What a kind of task must say, so that one loop trains all of them.

    example    has an id and an answer: a text, a question, a line of blanks
    unit       what a batch is made of and what has a target: a text, a question with its choices,
               a blank with its candidates, a window of a long text
    sequence   a row of the network's input (features.Features)

A kind reads records into examples, examples into units, and the network's outputs into answers. It
has no state but its task, and knows neither the training loop nor the verbs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.settings.sections import Section
from clue_ds.tasks import records
from clue_ds.tasks.features import Unit
from clue_ds.tasks.task import Record, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clue_ds.data import Tokenizer

Scores = dict[str, float]  # fractions from 0 to 1


class Example(NamedTuple):
    """One example of a file. `id`: the one in the file, else the example's number from 0."""

    id: int | str
    text: Any  # what the model reads, as its kind has it
    label: Any | None  # the answer, as its kind has it; None in a test file


class Answer(NamedTuple):
    """A model's answer to an example; both parts are plain JSON data."""

    value: Any  # what is scored and submitted
    details: dict[str, Any]  # all that `clue-ds predict` writes about it


class TaskFile(Section):
    """The keys of a YAML file that describes a user's own task: those of every kind."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")


def refuse_repeated(labels: Sequence[str]) -> None:
    """ValueError if a task file lists a label twice."""
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    if repeated:
        raise ValueError(f"labels {', '.join(repeated)} are listed twice")


class Kind(ABC):
    """What all tasks of a kind have in common; the object is one task's."""

    architecture: str  # the class of transformers that loads the fine-tuned model
    # (key in the scores, title in tables); the first is the main one.
    columns: tuple[tuple[str, str], ...]
    keys: ClassVar[type[TaskFile]]  # of a YAML file that describes a task of this kind
    # How the names of files that it reads end, which tells their format.
    suffixes: ClassVar[tuple[str, ...]] = records.SUFFIXES
    usual_fields: ClassVar[tuple[str, ...]]  # of a record, if no task names others
    has_labels: ClassVar[bool] = True  # whether the classes of the head are the task's labels

    def __init__(self, task: Task) -> None:
        self.task = task

    # ------------------------------------------------------------------------------- reading

    @classmethod
    @abstractmethod
    def custom(cls, given: Any, path: Path) -> Task:
        """The task that a YAML file describes; `given` is a valid object of `keys`."""

    def records(self, path: Path) -> Iterator[tuple[str, Record]]:
        """(place in the file for messages, record) of every example; the place begins with `path`.

        A record has `task.fields`, and the same form whatever the format of the file was. Without
        an own reader that is a line of JSON, CSV or TSV.
        """
        for line, record in records.records(path):
            yield f"{path}:{line}", record

    def companions(self, path: Path) -> list[Path]:
        """Other files that `records` reads with `path`; they count in the hash of the data."""
        return []

    @abstractmethod
    def text(self, record: Record, where: str) -> Any:
        """What the model reads of a record. A UserError begins with `where`."""

    @abstractmethod
    def label(self, record: Record, text: Any, where: str, notes: Counter[str]) -> Any | None:
        """The answer in a record; None: the example is left out and counted.

        A UserError begins with `where`: there is none, or none that the text allows. What was
        corrected is counted in `notes`, which the command prints.
        """

    def example(
        self, record: Record, number: int, where: str, labelled: bool, notes: Counter[str]
    ) -> Example | None:
        """The example of a record; None: it is left out and counted."""
        text = self.text(record, where)
        label = self.label(record, text, where, notes) if labelled else None
        if labelled and label is None:
            return None
        return Example(self.id_of(record, number, where), text, label)

    @property
    def num_texts(self) -> int:
        """How many plain texts make an example (1 or 2); 0: it must be given by its fields."""
        return 0

    def plain(self, texts: Sequence[str], where: str) -> Any:
        """What the model reads of `num_texts` plain texts."""
        raise NotImplementedError

    def id_of(self, record: Record, number: int, where: str) -> int | str:
        """The id of the record, else its number from 0."""
        name = self.task.id_field
        given = record if name is None else {"id": record.get(name)}
        return records.id_of(given, number, where)

    def require(self, record: Record, where: str) -> None:
        """UserError unless the record has all fields of the task."""
        for name in self.task.fields:
            if name not in record:
                raise UserError(f"{where}: no field {name!r} (has {', '.join(record) or 'none'})")

    def hub_record(self, record: Record, features: Any) -> Record:
        """The record of a row of CLUE's data set on the hub; `features`: its columns' types."""
        return record

    # -------------------------------------------------------------------------------- inputs

    @abstractmethod
    def encode(self, tokenizer: Tokenizer, text: Any, max_length: int) -> Sequence[Unit]:
        """The units of an example, at least one; a UserError says why there can't be any."""

    @abstractmethod
    def targets(self, text: Any, label: Any, units: Sequence[Any]) -> Sequence[Any]:
        """The target of each unit of an example."""

    def notes(self, text: Any, label: Any, units: Sequence[Any]) -> dict[str, int]:
        """What of an answer can't be trained (a noun in the plural -> how often); it is printed."""
        return {}

    # ------------------------------------------------------------------------------- network

    @abstractmethod
    def network(self, config: ModelConfig, seed: int) -> nn.Module:
        """An untrained network; it has a `config` and an encoder `bert`.

        It takes input_ids, token_type_ids and lengths and returns a tensor with a row for each
        sequence.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, units: Sequence[Any], targets: Sequence[Any]) -> Tensor:
        """The mean loss over what `count` counts; `outputs` are those of all rows of the units."""

    def count(self, units: Sequence[Any], targets: Sequence[Any]) -> int:
        """How many losses the mean of `loss` is taken over; ranks are weighted by it."""
        return len(units)

    # ------------------------------------------------------------------------------- answers

    @abstractmethod
    def raw(self, outputs: Tensor, units: Sequence[Any]) -> list[np.ndarray]:
        """What `answer` needs of the outputs, for each unit; ranks exchange it."""

    @abstractmethod
    def answer(self, text: Any, units: Sequence[Any], raws: Sequence[np.ndarray]) -> Answer:
        """The answer to an example, from all of its units."""

    def shown(self, text: Any) -> str:
        """An example in a few words, for messages."""
        return str(text)[:40]

    # -------------------------------------------------------------------------------- scores

    @abstractmethod
    def scores(self, examples: Sequence[Example], values: Sequence[Any]) -> Scores:
        """How good the values of answers are, over all examples: a number for each column."""

    def best_by(self, scores: dict[str, Any]) -> float:
        """The number by which the best epoch and the best run are chosen."""
        return float(scores[self.columns[0][0]])

    def baselines(self, train: Sequence[Example], dev: Sequence[Example]) -> dict[str, Scores]:
        """Scores on dev without a model: what is done instead, as a noun -> scores."""
        return {}

    def result(
        self, train: Sequence[Example], dev: Sequence[Example], values: Sequence[Any]
    ) -> dict[str, Any]:
        """Further entries of result.json, about the best epoch's answers to dev."""
        return {}

    # ----------------------------------------------------------------------------- submission

    @abstractmethod
    def submission(self, examples: Sequence[Example], values: Sequence[Any]) -> str:
        """The content of the file of answers that CLUE's leaderboard accepts."""

    @abstractmethod
    def check(
        self, content: bytes, examples: Sequence[Example], where: str, is_scored: bool
    ) -> tuple[list[Any], list[str]]:
        """(values, mistakes) of a file of answers; without mistakes, a value for each example.

        `is_scored`: the leaderboard reads these bytes. Otherwise the answers are written anew, and
        differences of form are harmless.
        """
