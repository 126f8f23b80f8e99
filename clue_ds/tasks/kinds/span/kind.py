"""Span reading: the answer to a question is a part of a text (CMRC2018, DRCD, SQuAD).

The network rates each token as the begin and as the end of the answer. A long context is read in
windows; the answer is the best span of all of them, cut from the raw text. Every question gets an
answer: "there is none" is not learned (SQuAD 2.0), and such questions are left out and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.settings.sections import Section
from clue_ds.tasks import lines, records
from clue_ds.tasks.heads import BertForQuestionAnswering
from clue_ds.tasks.kinds import answer_object
from clue_ds.tasks.kinds.base import Answer, Example, Kind, Scores, TaskFile
from clue_ds.tasks.kinds.span import (
    EVALUATIONS_PER_EPOCH,
    SETTINGS,
    SMALL_SETTINGS,
    candidates,
    scoring,
    squad,
    windows,
)
from clue_ds.tasks.kinds.span.squad import ANSWERS, FIELDS, Gold
from clue_ds.tasks.kinds.span.windows import Limits, Reading, Window
from clue_ds.tasks.task import Record, Settings, Task

Target = tuple[int, int]  # positions of the answer's first and last token in the sequence

BASELINE_CHARACTERS = 30
BASELINE = f"the first {BASELINE_CHARACTERS} characters of the context"


class Options(Section):
    """What only tasks of span reading have; a row of the registry gives those that differ."""

    max_question_length: int = Field(64, ge=1)  # tokens; the rest of a question is not read
    doc_stride: int = Field(128, ge=1)  # tokens from the start of a window to that of the next
    max_answer_length: int = Field(50, ge=1)  # tokens
    n_best: int = Field(20, ge=1)  # answers that predict shows for each question
    convert: Literal["t2s", "none"] = "none"  # what the model reads; answers are never converted
    absent_answers: Literal["refuse", "skip"] = "refuse"  # questions whose answer is not there


class CustomTask(TaskFile, Options):
    """The keys of a YAML file that describes a user's own task of span reading."""

    max_length: int = Field(SETTINGS.max_length, ge=16)
    batch_size: int = Field(SETTINGS.batch_size, ge=1)
    lr: float | None = Field(None, gt=0)
    epochs: int | None = Field(None, ge=1)


class Span(Kind):
    """The kind `span`."""

    architecture = "BertForQuestionAnswering"
    columns = (
        ("em", "EM"),
        ("f1", "F1"),
        ("em_squad", "EM (SQuAD's script)"),
        ("f1_squad", "F1 (SQuAD's script)"),
    )
    keys = CustomTask
    usual_fields = FIELDS
    has_labels = False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.options = Options.model_validate(dict(task.options))

    @classmethod
    def custom(cls, given: CustomTask, path: Path) -> Task:
        chosen = {name: getattr(given, name) for name in Options.model_fields}
        plain, small = (
            Settings(
                given.max_length,
                given.batch_size,
                given.lr or default.lr,
                given.epochs or default.epochs,
            )
            for default in (SETTINGS, SMALL_SETTINGS)
        )
        return Task(
            given.name,
            "span",
            FIELDS,
            (),
            plain,
            small,
            label_field=ANSWERS,
            format="squad",
            options=chosen,
            evaluations_per_epoch=EVALUATIONS_PER_EPOCH,
        )

    # ------------------------------------------------------------------------------- reading

    def records(self, path: Path) -> Iterator[tuple[str, Record]]:
        """Records of SQuAD's JSON, or of a file that has a record a line."""
        if path.suffix == ".json" and not _has_a_record_a_line(path):
            return squad.squad_records(path)
        return super().records(path)

    def text(self, record: Record, where: str) -> Reading:
        self.require(record, where)
        reading = squad.reading_of(record, where)
        records.checked((reading.question, reading.context), where)
        return reading

    @property
    def num_texts(self) -> int:
        return 2

    def plain(self, texts: Sequence[str], where: str) -> Reading:
        return self.text(dict(zip(FIELDS, texts, strict=True)), where)

    def label(self, record: Record, text: Reading, where: str, notes: Counter[str]) -> Gold | None:
        skips = self.options.absent_answers == "skip"
        return squad.gold_of(record, text, where, notes, skips)

    # -------------------------------------------------------------------------------- inputs

    def encode(self, tokenizer: Tokenizer, text: Reading, max_length: int) -> list[Window]:
        options = self.options
        limits = Limits(max_length, options.max_question_length, options.doc_stride)
        found = windows.windows(tokenizer, text, limits, options.convert == "t2s")
        if not len(found[0].begins):
            raise UserError(
                f"the context {text.context[:40]!r} has no character that is a token; give it text"
            )
        return found

    def targets(self, text: Reading, label: Gold, units: Sequence[Window]) -> list[Target]:
        return [windows.target(window, label.begin, label.end) for window in units]

    # ------------------------------------------------------------------------------- network

    def network(self, config: ModelConfig, seed: int) -> BertForQuestionAnswering:
        return BertForQuestionAnswering(config, seed)

    def loss(self, outputs: Tensor, units: Sequence[Window], targets: Sequence[Target]) -> Tensor:
        """The mean of two cross-entropies over the positions of a sequence, without its padding."""
        sizes = torch.tensor([unit.size for unit in units], device=outputs.device)
        is_padding = torch.arange(outputs.shape[1], device=outputs.device) >= sizes[:, None]
        logits = outputs.float().masked_fill(is_padding[..., None], -torch.inf)  # [B, S, 2]
        return F.cross_entropy(logits, torch.tensor(targets, device=outputs.device))

    # ------------------------------------------------------------------------------- answers

    def raw(self, outputs: Tensor, units: Sequence[Window]) -> list[np.ndarray]:
        """The best spans [n, 3] of each window: first token, last token, score."""
        logits = outputs.float().cpu().numpy()
        limits = self.options.max_answer_length, self.options.n_best
        return [
            candidates.best_spans(
                rows[unit.first : unit.first + len(unit.begins)], unit.is_best, *limits
            )
            for rows, unit in zip(logits, units, strict=True)
        ]

    def answer(self, text: Reading, units: Sequence[Window], raws: Sequence[np.ndarray]) -> Answer:
        found = candidates.candidates(text.context, units, raws, self.options.n_best)
        n_best = candidates.listed(found)
        best = n_best[0]
        details = {"answer": best["text"], "start": best["start"], "end": best["end"]}
        details |= {"probability": best["probability"], "n_best": n_best}
        return Answer(best["text"], details)

    def shown(self, text: Reading) -> str:
        return repr(text.question[:40])

    # -------------------------------------------------------------------------------- scores

    def scores(self, examples: Sequence[Example], values: Sequence[str]) -> Scores:
        found = {}
        for name, scorer in (("", scoring.cmrc), ("_squad", scoring.drcd)):
            scores = [
                scorer(_answers(example), value)
                for example, value in zip(examples, values, strict=True)
            ]
            found[f"em{name}"] = sum(score.exact for score in scores) / len(scores)
            found[f"f1{name}"] = sum(score.f1 for score in scores) / len(scores)
        return found

    def best_by(self, scores: dict[str, Any]) -> float:
        """EM + F1, as CLUE's scripts choose."""
        return float(scores["em"] + scores["f1"])

    def baselines(self, train: Sequence[Example], dev: Sequence[Example]) -> dict[str, Scores]:
        beginnings = [example.text.context[:BASELINE_CHARACTERS] for example in dev]
        return {BASELINE: self.scores(dev, beginnings)}

    # ----------------------------------------------------------------------------- submission

    def submission(self, examples: Sequence[Example], values: Sequence[str]) -> str:
        ids = [str(example.id) for example in examples]
        return answer_object.write(dict(zip(ids, values, strict=True)))

    def check(
        self, content: bytes, examples: Sequence[Example], where: str, is_scored: bool
    ) -> tuple[list[Any], list[str]]:
        ids = [str(example.id) for example in examples]
        try:
            if not is_scored and answer_object.is_lines(content):
                found, mistakes = _answers_on_lines(content, where)
            else:
                found, mistakes = answer_object.read(content, where)
        except UserError as error:
            return [], [str(error)]
        if found or not mistakes:
            mistakes += answer_object.wrong_names(found, ids, where)
        for name, value in found.items():
            if not isinstance(value, str):
                given = json.dumps(value, ensure_ascii=False)[:40]
                mistakes.append(f"{where}: {name}: answer {given} must be a string")
        return ([], mistakes) if mistakes else ([found[key] for key in ids], [])


def _answers(example: Example) -> list[str]:
    assert example.label is not None, "a file without answers can't be scored"
    return example.label.answers


def _answers_on_lines(content: bytes, where: str) -> tuple[dict[str, Any], list[str]]:
    """(answers, mistakes) of what `clue-ds predict` writes: {"id": ..., "answer": ...} a line."""
    found: dict[str, Any] = {}
    mistakes = []
    text = lines.decode(content.removeprefix(lines.BYTE_ORDER_MARK), where, 1)
    for number, record in lines.json_objects(enumerate(text.split("\n"), start=1), where):
        if "id" not in record or "answer" not in record:
            mistakes.append(f'{where}:{number}: not {{"id": ..., "answer": ...}}')
        elif str(record["id"]) in found:
            mistakes.append(f"{where}:{number}: id {record['id']} is answered twice")
        else:
            found[str(record["id"])] = record["answer"]
    return found, mistakes


def _has_a_record_a_line(path: Path) -> bool:
    """Whether the first line that is not blank is a whole JSON object, and not SQuAD's."""
    first = next((line for line in lines.read_lines(path) if line.strip()), "{")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "data" not in record
