"""The table of tasks: CLUE's classification tasks, one entry each, and custom ones from YAML.

To add a task, add an entry to TASKS. The order of a task's labels is the order of their ids in a
fine-tuned model. Fields, labels and settings come from CLUE's own files and scripts, except the
settings of OCNLI, which are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        default_factory=lambda: {"train": ("train",), "dev": ("dev",)}
    )
    test_versions: dict[str, TestVersion] = field(default_factory=lambda: {"1.1": TestVersion()})
    # Which of several versions a test file is, by its content; None: it doesn't tell.
    recognize: Callable[[Iterable[Record]], str | None] | None = None
    # Names for the answers that were published and are no longer accepted -> by whom.
    old_answers: dict[str, str] = field(default_factory=dict)
    num_published: dict[Split, int] = field(default_factory=dict)  # examples of train and dev

    @property
    def folder(self) -> str:
        """Where CLUE's archives put the task's files."""
        return f"{self.name}_public"

    def old_stems(self, version: str) -> tuple[str, ...]:
        """Names of other versions' files, which older archives give to this one."""
        return tuple(v.stem for name, v in self.test_versions.items() if name != version)

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
        plain = self.settings
        epochs = max(plain.epochs, SMALL_MODEL_EPOCHS)
        return Settings(plain.max_length, plain.batch_size, SMALL_MODEL_LR, epochs)


def csl_text(record: Record) -> Text:
    """The pair of keywords (joined by spaces) and abstract; the task: do they belong together?"""
    if not isinstance(record["keyword"], list):
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


def tnews_version(records: Iterable[Record]) -> str:
    """Test set 1.0 has keywords and 1.1 has none."""
    return "1.0" if any(record.get("keywords") for record in records) else "1.1"


def wsc_version(records: Iterable[Record]) -> str | None:
    """The two test sets have no text in common; the number of lines tells them apart."""
    num_lines = sum(1 for _ in records)
    versions = TASKS["cluewsc2020"].test_versions
    return next((name for name, v in versions.items() if v.num_lines == num_lines), None)


def _one_test(answers: str, num_lines: int | None = None) -> dict[str, TestVersion]:
    return {"1.1": TestVersion("test", answers, GUIDE, num_lines)}


def _two_tests(answers: str, num_new: int, num_old: int) -> dict[str, TestVersion]:
    return {
        "1.1": TestVersion("test", f"{answers}11_predict.json", GUIDE, num_new),
        "1.0": TestVersion("test1.0", f"{answers}10_predict.json", GUIDE, num_old),
    }


GUIDE = "CLUE's submission guide of 2021-09-04"
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
            test_versions=_one_test("afqmc_predict.json", 3_861),
            num_published={"train": 34_334, "dev": 4_316},
        ),
        Task(
            "tnews",
            "single",
            ("sentence",),
            TNEWS_LABELS,
            name_field="label_desc",
            test_versions=_two_tests("tnews", 10_000, 10_000),
            recognize=tnews_version,
            old_answers={"tnews_predict.json": "CLUE's scripts, when there was one test set"},
            num_published={"train": 53_360, "dev": 10_000},
        ),
        Task(
            "iflytek",
            "single",
            ("sentence",),
            tuple(map(str, range(119))),
            Settings(batch_size=32),
            name_field="label_des",
            test_versions=_one_test("iflytek_predict.json", 2_600),
            num_published={"train": 12_133, "dev": 2_599},
        ),
        Task(
            "cmnli",
            "pair",
            PAIR,
            NLI_LABELS,
            Settings(batch_size=64, lr=3e-5, epochs=2),
            skipped_labels=NO_LABEL,
            test_versions=_one_test("cmnli_predict.json", 13_880),
            num_published={"train": 391_783, "dev": 12_241},
        ),
        Task(
            "csl",
            "pair",
            ("keyword", "abst"),
            ("0", "1"),
            Settings(max_length=256, lr=1e-5, epochs=5),
            small_settings=Settings(lr=SMALL_MODEL_LR, epochs=5),
            build=csl_text,
            test_versions=_one_test("csl_predict.json", 3_000),
            num_published={"train": 20_000, "dev": 3_000},
        ),
        Task(
            "cluewsc2020",
            "single",
            ("text", "target"),
            ("true", "false"),
            Settings(lr=1e-5, epochs=10),
            small_settings=Settings(lr=SMALL_MODEL_LR, epochs=50),
            build=wsc_text,
            test_versions=_two_tests("cluewsc", 2_574, 290),
            recognize=wsc_version,
            old_answers={
                "cluewsc2020_predict.json": "CLUE's sample submission of 2020",
                "wsc_predict.json": "the README of CLUE's archive of 2021-08-29",
            },
            num_published={"train": 1_244, "dev": 304},
        ),
        Task(
            "ocnli",
            "pair",
            PAIR,
            NLI_LABELS,
            Settings(batch_size=32),
            skipped_labels=NO_LABEL,
            stems={"train": ("train", "train.50k"), "dev": ("dev",)},
            test_versions=_one_test("ocnli_50k_predict.json"),
            old_answers={"ocnli_predict.json": "some scripts; it scored 0 (issue 104 of CLUE)"},
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
