"""The table of tasks: CLUE's tasks, one entry each, and custom ones from YAML.

To add a task, add an entry to TASKS. The order of a task's labels is the order of their ids in a
fine-tuned model. Fields, labels and settings come from CLUE's own files and scripts, except the
settings of OCNLI, which are ours.

Which kind a task is decides how it is read, trained, answered and scored (kinds/).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from clue_ds import config
from clue_ds.errors import UserError
from clue_ds.tasks import kinds
from clue_ds.tasks.features import Text
from clue_ds.tasks.kinds import span as span_reading
from clue_ds.tasks.kinds.span import squad
from clue_ds.tasks.kinds.tag import schemes
from clue_ds.tasks.task import SMALL_MODEL_LR as SMALL_MODEL_LR
from clue_ds.tasks.task import Record as Record
from clue_ds.tasks.task import Settings as Settings
from clue_ds.tasks.task import Split as Split
from clue_ds.tasks.task import Task as Task
from clue_ds.tasks.task import TestVersion as TestVersion


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
    return _by_number("cluewsc2020", records)


def c3_version(records: Iterable[Record]) -> str | None:
    """The number of questions tells the test sets apart."""
    return _by_number("c3", records)


def chid_version(records: Iterable[Record]) -> str | None:
    """Blanks are numbered through the archive, and those of test set 1.1 are its last."""
    passages = next(iter(records), {}).get("content")
    found = re.search(r"#idiom(\d+)#", str(passages))
    if found is None:
        return None
    return "1.1" if int(found[1]) >= CHID_FIRST_OF_TEST_11 else "1.0"


def _by_number(task: str, records: Iterable[Record]) -> str | None:
    number = sum(1 for _ in records)
    versions = TASKS[task].test_versions
    return next((name for name, v in versions.items() if v.num_lines == number), None)


def _one_test(answers: str, num_lines: int | None = None) -> dict[str, TestVersion]:
    return {"1.1": TestVersion("test", answers, GUIDE, num_lines)}


def _two_tests(
    answers: str, num_new: int | None, num_old: int, stem: str = "test"
) -> dict[str, TestVersion]:
    return {
        "1.1": TestVersion(stem, f"{answers}11_predict.json", GUIDE, num_new),
        "1.0": TestVersion("test1.0", f"{answers}10_predict.json", GUIDE, num_old),
    }


GUIDE = "CLUE's submission guide of 2021-09-04"
NOT_ON_BOARD = "clue_ds, because CLUE's leaderboard has no such task"
NLI_LABELS = ("contradiction", "entailment", "neutral")
TNEWS_LABELS = tuple(str(n) for n in range(100, 117) if n not in (105, 111))
NO_LABEL = frozenset({"-"})
PAIR = ("sentence1", "sentence2")
CHID_FIRST_OF_TEST_11 = 623_377
CLUENER_TYPES = (
    "address", "book", "company", "game", "government",
    "movie", "name", "organization", "position", "scene",
)  # fmt: skip

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
        Task(
            "cmrc2018",
            "span",
            squad.FIELDS,
            (),
            span_reading.SETTINGS,
            span_reading.SMALL_SETTINGS,
            label_field=squad.ANSWERS,
            format="squad",
            evaluations_per_epoch=span_reading.EVALUATIONS_PER_EPOCH,
            test_versions=_one_test("cmrc2018_predict.json", 2_000),
            num_published={"train": 10_142, "dev": 3_219},
        ),
        Task(
            "drcd",
            "span",
            squad.FIELDS,
            (),
            span_reading.SETTINGS,
            span_reading.SMALL_SETTINGS,
            label_field=squad.ANSWERS,
            format="squad",
            options={"convert": "t2s"},
            evaluations_per_epoch=span_reading.EVALUATIONS_PER_EPOCH,
            test_versions={"1.1": TestVersion(source=NOT_ON_BOARD, num_lines=3_493)},
            num_published={"train": 26_936, "dev": 3_524},
        ),
        Task(
            "c3",
            "choice",
            ("text", "question", "choice"),
            (),
            Settings(512, 24, 2e-5, 8),
            small_settings=Settings(512, 32, 5e-5, 8),  # CLUE's for ALBERT-tiny
            label_field="answer",
            # m: mixed genres, d: dialogues.
            stems={"train": ("m-train", "train"), "dev": ("m-dev", "dev")},
            continued={"m-train": ("d-train",), "m-dev": ("d-dev",)},
            test_versions=_two_tests("c3", 1_625, 3_892, "test1.1"),
            older_stems=("test",),
            recognize=c3_version,
            num_published={"train": 11_869, "dev": 3_816},
        ),
        Task(
            "chid",
            "cloze",
            ("content", "candidates"),
            (),
            Settings(64, 24, 2e-5, 3, 0.06),
            small_settings=Settings(64, 24, 2e-5, 3, 0.06),  # CLUE's for ALBERT-tiny
            label_field="answers",
            test_versions=_two_tests("chid", None, 3_231, "test1.1"),
            older_stems=("test",),
            recognize=chid_version,
            num_published={"train": 84_709, "dev": 3_218},
        ),
        # No training data and no labels: models of CMNLI (CLUE 1.0) or OCNLI (1.1) answer it.
        Task(
            "clue_diagnostics",
            "pair",
            ("premise", "hypothesis"),
            NLI_LABELS,
            test_versions={
                "1.1": TestVersion(
                    "diagnostics_test", "diagnostics_predict.json", "PyCLUE's scripts", 514
                )
            },
            answered_by=("cmnli", "ocnli"),
            id_field="index",
        ),
        Task(
            "cluener",
            "tag",
            ("text",),
            schemes.tags(CLUENER_TYPES),
            Settings(batch_size=24, lr=3e-5, epochs=4),
            metric="text_set_f1",
            test_versions=_one_test("cluener_predict.json", 1_345),
            num_published={"train": 10_748, "dev": 1_343},
            options={"overlapping": "skip"},  # two in train
        ),
        Task(
            "msraner",
            "tag",
            ("text",),
            schemes.tags(("NR", "NS", "NT")),
            Settings(max_length=256, batch_size=8, epochs=5),
            metric="span_f1",
            test_versions={},
        ),
    )
}
# The tasks of `--task all`.
ALL = (
    "afqmc",
    "tnews",
    "iflytek",
    "cmnli",
    "csl",
    "cluewsc2020",
    "cmrc2018",
    "c3",
    "chid",
    "cluener",
)


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


def custom(path: str | Path) -> Task:
    """The task that a YAML file describes; a UserError lists everything wrong with the file."""
    values = config.read_yaml(path)
    kind = values.pop("kind", "classify")
    if not isinstance(kind, str) or kind not in kinds.CUSTOM_KINDS:
        known = ", ".join(kinds.CUSTOM_KINDS)
        raise UserError(f"{path}: kind {kind!r} must be one of {known}")
    of_kind = kinds.KINDS[kinds.CUSTOM_KINDS[kind]]
    try:
        given = of_kind.keys.model_validate(values)
    except ValidationError as error:
        raise UserError(config.explain(error, of_kind.keys, str(path))) from None
    task = of_kind.custom(given, Path(path))
    if task.name in TASKS:
        raise UserError(f"{path}: name {task.name} is taken by CLUE's own task; choose another")
    return task
