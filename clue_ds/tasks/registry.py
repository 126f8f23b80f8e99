"""The table of tasks: CLUE's classification tasks, one entry each, and custom ones from YAML.

To add a task, add an entry to TASKS. The order of a task's labels is the order of their ids in a
fine-tuned model. Fields, labels and settings come from CLUE's own files and scripts, except the
settings of OCNLI, which are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clue_ds import config
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.tasks.features import Text

Record = dict[str, Any]  # one line of a task's file: field name -> value
Kind = Literal["single", "pair"]
Split = Literal["train", "dev", "test"]

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


@dataclass(frozen=True)
class Task:
    """A classification task: the fields to read, the labels to predict, how to train."""

    name: str
    kind: Kind  # one text, or two with different token types
    fields: tuple[str, ...]  # that every record must have
    labels: tuple[str, ...]
    settings: Settings = Settings()
    small_settings: Settings | None = None  # for small models, instead of upstream's advice
    build: Callable[[Record], Text] | None = None  # makes the text; default: the fields unchanged
    label_field: str = "label"
    skipped_labels: frozenset[str] = frozenset()  # mean that the annotators disagreed
    name_field: str | None = None  # the field with the label's meaning in words
    metric: str = "accuracy"
    # Stems of the file names, best first; the suffix tells the format (examples.SUFFIXES).
    stems: dict[Split, tuple[str, ...]] = field(
        default_factory=lambda: {s: (s,) for s in ("train", "dev", "test")}
    )
    # Version of the test set -> stem of its file. Only TNEWS has two.
    test_stems: dict[str, str] = field(default_factory=lambda: {"1.1": "test"})
    num_published: dict[Split, int] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where CLUE's archives put the task's files."""
        return f"{self.name}_public"

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
        plain = self.settings
        epochs = max(plain.epochs, SMALL_MODEL_EPOCHS)
        return Settings(plain.max_length, plain.batch_size, SMALL_MODEL_LR, epochs)


def csl_text(record: Record) -> Text:
    """The pair of keywords (joined by spaces) and abstract; the task: do they belong together?"""
    if isinstance(record["keyword"], str):
        raise TypeError("keyword must be a list of texts")
    return " ".join(record["keyword"]), record["abst"]


def wsc_text(record: Record) -> Text:
    """The text, with marks around _span1_ and the [pronoun]."""
    text, target = record["text"], record["target"]
    marks = []
    for span, (before, after) in (("span1", "__"), ("span2", "[]")):
        begin, words = target[f"{span}_index"], target[f"{span}_text"]
        if text[begin : begin + len(words)] != words:
            raise ValueError(f"{words!r} is not at character {begin} of the text")
        marks.append((begin, begin + len(words), before, after))
    for begin, end, before, after in sorted(marks, reverse=True):
        text = f"{text[:begin]}{before}{text[begin:end]}{after}{text[end:]}"
    return text


NLI_LABELS = ("contradiction", "entailment", "neutral")
TNEWS_LABELS = tuple(str(n) for n in range(100, 117) if n not in (105, 111))
NO_LABEL = frozenset({"-"})
PAIR = ("sentence1", "sentence2")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "afqmc",
            "pair",
            PAIR,
            ("0", "1"),
            num_published={"train": 34_334, "dev": 4_316, "test": 3_861},
        ),
        Task(
            "tnews",
            "single",
            ("sentence",),
            TNEWS_LABELS,
            name_field="label_desc",
            test_stems={"1.1": "test", "1.0": "test1.0"},
            num_published={"train": 53_360, "dev": 10_000, "test": 10_000},
        ),
        Task(
            "iflytek",
            "single",
            ("sentence",),
            tuple(map(str, range(119))),
            Settings(batch_size=32),
            name_field="label_des",
            num_published={"train": 12_133, "dev": 2_599, "test": 2_600},
        ),
        Task(
            "cmnli",
            "pair",
            PAIR,
            NLI_LABELS,
            Settings(batch_size=64, lr=3e-5, epochs=2),
            skipped_labels=NO_LABEL,
            num_published={"train": 391_783, "dev": 12_241, "test": 13_880},
        ),
        Task(
            "csl",
            "pair",
            ("keyword", "abst"),
            ("0", "1"),
            Settings(max_length=256, lr=1e-5, epochs=5),
            small_settings=Settings(lr=SMALL_MODEL_LR, epochs=5),
            build=csl_text,
            num_published={"train": 20_000, "dev": 3_000, "test": 3_000},
        ),
        Task(
            "cluewsc2020",
            "single",
            ("text", "target"),
            ("true", "false"),
            Settings(lr=1e-5, epochs=10),
            small_settings=Settings(lr=SMALL_MODEL_LR, epochs=50),
            build=wsc_text,
            num_published={"train": 1_244, "dev": 304, "test": 290},
        ),
        Task(
            "ocnli",
            "pair",
            PAIR,
            NLI_LABELS,
            Settings(batch_size=32),
            skipped_labels=NO_LABEL,
            stems={"train": ("train", "train.50k"), "dev": ("dev",), "test": ("test",)},
        ),
    )
}
# The tasks of `--task all`: the classification tasks of CLUE 1.0 and 1.1.
ALL = ("afqmc", "tnews", "iflytek", "cmnli", "csl", "cluewsc2020")


def get(name: str | Path) -> Task:
    """The task called `name`, or the one that the YAML file `name` describes."""
    if str(name) in TASKS:
        return TASKS[str(name)]
    if str(name).endswith((".yaml", ".yml")):
        return custom(name)
    raise UserError(
        f"there is no task {str(name)!r}; tasks: {', '.join(TASKS)}, or a YAML file that "
        "describes yours (docs/finetuning.md)"
    )


class CustomTask(BaseModel):
    """The keys of a YAML file that describes a user's own task."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
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
        repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels {', '.join(repeated)} are listed twice")
        return self


def custom(path: str | Path) -> Task:
    """The task that a YAML file describes; a UserError lists everything wrong with the file."""
    values = config.read_yaml(path)
    try:
        given = CustomTask.model_validate(values)
    except ValidationError as error:
        raise UserError(config.explain(error, CustomTask, str(path))) from None
    if given.name in TASKS:
        raise UserError(f"{path}: name {given.name} is taken by CLUE's own task; choose another")
    plain, small = (
        Settings(given.max_length, given.batch_size, given.lr or lr, given.epochs or epochs)
        for lr, epochs in ((Settings.lr, Settings.epochs), (SMALL_MODEL_LR, SMALL_MODEL_EPOCHS))
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
