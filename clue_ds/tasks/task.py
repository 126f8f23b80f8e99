"""What a task is: a row of the table in registry.py, or what a user's YAML file describes.

A task is data. What its kind does with it (how a record becomes inputs, head, loss, answer, metric,
submission) is in kinds/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from clue_ds.presets import ModelConfig
from clue_ds.tasks.features import Text

Record = dict[str, Any]  # one line of a task's file: field name -> value
KindName = Literal["single", "pair", "choice", "cloze", "span", "tag"]
Split = Literal["train", "dev", "test"]
Precision = Literal["fp32", "bf16"]

# Upstream's advice for small models: a larger learning rate, 5 to 8 epochs, keep the best epoch.
SMALL_MODEL_LAYERS = 4
SMALL_MODEL_LR = 1e-4
SMALL_MODEL_EPOCHS = 5


@dataclass(frozen=True)
class Settings:
    """How a task is fine-tuned unless the user asks for something else."""

    max_length: int = 128  # tokens, special ones included
    batch_size: int = 16
    lr: float = 2e-5
    epochs: int = 3
    warmup_ratio: float = 0.1


@dataclass(frozen=True)
class TestVersion:
    """A version of a task's test set, and the name that the leaderboard wants for its answers.

    A wrong name scores 0 without a message, so `source` tells where the name is written.
    """

    stem: str = "test"  # of the file's name
    answers: str = ""  # file name in the zip; default: {task}_predict.json
    source: str = ""
    num_lines: int | None = None  # of CLUE's file


@dataclass(frozen=True)
class Task:
    """A task: its kind, the fields to read, the labels to predict, how to train."""

    name: str
    kind: KindName  # single and pair are classification of one text, or of two
    fields: tuple[str, ...]  # that every record must have
    labels: tuple[str, ...]  # of a kind whose answers are labels
    settings: Settings = Settings()
    small_settings: Settings | None = None  # for small models, instead of upstream's advice
    build: Callable[[Record], Text] | None = None  # makes the text; default: the fields unchanged
    label_field: str = "label"
    skipped_labels: frozenset[str] = frozenset()  # mean that the annotators disagreed
    name_field: str | None = None  # the field with the label's meaning in words
    metric: str = "accuracy"
    # Stems of the file names, best first; the suffix tells the format (examples.SUFFIXES).
    stems: dict[Split, tuple[str, ...]] = field(
        default_factory=lambda: {"train": ("train",), "dev": ("dev",)}
    )
    test_versions: dict[str, TestVersion] = field(default_factory=lambda: {"1.1": TestVersion()})
    # Which of several versions a test file is, by its content; None: it doesn't tell.
    recognize: Callable[[Iterable[Record]], str | None] | None = None
    # Names for the answers that were published and are no longer accepted -> by whom.
    old_answers: dict[str, str] = field(default_factory=dict)
    num_published: dict[Split, int] = field(default_factory=dict)  # examples of train and dev
    format: str = "lines"  # of the files; a kind may read others than JSON lines, CSV and TSV
    options: Mapping[str, Any] = field(default_factory=dict)  # settings that only its kind has
    # Stem of a file -> stems of the files that continue it, in the same directory.
    continued: dict[str, tuple[str, ...]] = field(default_factory=dict)
    evaluations_per_epoch: int = 1  # on dev; the best one is kept
    older_stems: tuple[str, ...] = ()  # of a test file in older archives, of whichever version
    # Of a test set without training data: the tasks whose models answer it.
    answered_by: tuple[str, ...] = ()
    id_field: str | None = None  # the field with an example's id, which its answers must have

    @property
    def folder(self) -> str:
        """Where CLUE's archives put the task's files."""
        return f"{self.name}_public"

    def old_stems(self, version: str) -> tuple[str, ...]:
        """Names of other versions' files, which older archives give to this one."""
        others = [v.stem for name, v in self.test_versions.items() if name != version]
        return (*others, *self.older_stems)

    def answers_name(self, version: str) -> str:
        """The name in a submission of the answers to a version of the test set."""
        return self.test_versions[version].answers or f"{self.name}_predict.json"

    def text(self, record: Record) -> Text:
        """What the model reads of a record, which has all of `fields`."""
        if self.build is not None:
            return self.build(record)
        if self.kind == "single":
            return record[self.fields[0]]
        return record[self.fields[0]], record[self.fields[1]]

    def settings_for(self, model: ModelConfig) -> Settings:
        """The settings for a model of this size."""
        if model.num_hidden_layers > SMALL_MODEL_LAYERS:
            return self.settings
        if self.small_settings is not None:
            return self.small_settings
        epochs = max(self.settings.epochs, SMALL_MODEL_EPOCHS)
        return replace(self.settings, lr=SMALL_MODEL_LR, epochs=epochs)
