"""Cloze: which of the candidates belongs into each blank of some passages (ChID).

    {"candidates": ["...", ...], "content": ["... #idiom577157# ...", ...]}

The answers are indices of candidates: a list in the order of the blanks, or an object by their
names, in the field `answers` or (CLUE's files) in `{stem}_answer.json` beside the file.

An example is a line, and each of its blanks is a unit with a sequence for each candidate: [CLS]
candidate [SEP] left [unused1] right [SEP]. The blank is in the middle as far as the passage allows;
other blanks are four [MASK]. Guarantee: within a line a candidate fills at most one blank, and of
all ways to do that the one with the largest sum of ratings is chosen. (CLUE's scripts choose
greedily, and one of them groups by batch instead of by line.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from pydantic import Field
from torch import Tensor

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.presets import ModelConfig
from clue_ds.tasks import lines, records
from clue_ds.tasks.features import Features
from clue_ds.tasks.heads import BertForMultipleChoice
from clue_ds.tasks.kinds import answer_lines, answer_object, rating
from clue_ds.tasks.kinds.base import Answer, Example, Kind, Scores, TaskFile
from clue_ds.tasks.task import Record, Settings, Task

IDIOM = r"#idiom\d+#"
BLANK_TOKEN = "[unused1]"
MASKS_OF_A_BLANK = 4
FEWEST_TOKENS = 8  # of a passage, beside the longest candidate
CHANCE = "guessing"


class Blank(NamedTuple):
    """A place in a passage; `name` is unique in its file."""

    name: str
    passage: int
    begin: int
    end: int


class Passages(NamedTuple):
    """Passages with blanks, and what they are to be filled with."""

    candidates: tuple[str, ...]
    passages: tuple[str, ...]
    blanks: tuple[Blank, ...]


class CandidateRows(Sequence[Features]):
    """The sequences of a blank, put together when a batch needs them.

    ChID has half a million blanks with ten sequences each; kept apart they would take gigabytes.
    """

    def __init__(self, candidates: Sequence[np.ndarray], passage: np.ndarray, cut: bool) -> None:
        self.candidates = candidates  # of the line, each with [CLS] and [SEP] around it
        self.passage = passage  # with [SEP]
        self.cut = cut

    def __len__(self) -> int:
        return len(self.candidates)

    @overload
    def __getitem__(self, index: int) -> Features: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Features]: ...
    def __getitem__(self, index: int | slice) -> Features | Sequence[Features]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids = np.concatenate([self.candidates[index], self.passage]).astype(np.int64)
        return Features(ids, len(ids), self.cut)


class BlankUnit(NamedTuple):
    """A blank with all its candidates."""

    rows: CandidateRows

    @property
    def size(self) -> int:
        return len(self.rows.passage) + max(map(len, self.rows.candidates))

    @property
    def truncated(self) -> bool:
        return self.rows.cut


class CustomCloze(TaskFile):
    """The keys of a YAML file that describes a user's own cloze task."""

    content: str = "content"
    candidates: str = "candidates"
    label: str = "answers"
    blank: str | None = Field(None, min_length=1)  # the text that marks a blank; default #idiomN#
    once: bool = True
    max_length: int = Field(64, ge=16)
    batch_size: int = Field(24, ge=1)
    lr: float = Field(2e-5, gt=0)
    epochs: int = Field(3, ge=1)


class Cloze(Kind):
    """The kind `cloze`; `task.fields` are the passages and the candidates."""

    architecture = "BertForMultipleChoice"
    columns = (("accuracy", "accuracy"),)
    keys = CustomCloze
    usual_fields = ("content", "candidates")
    has_labels = False

    @classmethod
    def custom(cls, given: CustomCloze, path: Path) -> Task:
        settings = Settings(given.max_length, given.batch_size, given.lr, given.epochs, 0.06)
        options: dict[str, Any] = {}
        if given.blank is not None:
            options["blank"] = given.blank
        if not given.once:
            options["once"] = False
        fields = (given.content, given.candidates)
        return Task(
            given.name, "cloze", fields, (), settings, settings,
            label_field=given.label, options=options,
        )  # fmt: skip

    # ------------------------------------------------------------------------------- reading

    def records(self, path: Path) -> Iterator[tuple[str, Record]]:
        answers: dict[str, Any] | None = None
        for companion in self.companions(path):
            answers = lines.json_file(companion)
            if not isinstance(answers, dict):
                raise UserError(f"{companion} must be one JSON object from blanks to indices")
        seen: set[str] = set()
        for where, record in super().records(path):
            if answers is not None and self.task.label_field not in record:
                record = {**record, self.task.label_field: answers}
            if "blank" not in self.task.options:
                self._check_unique(record, seen, where)
            yield where, record

    def companions(self, path: Path) -> list[Path]:
        """`{stem}_answer.json`, in which CLUE's files have their answers."""
        beside = path.with_name(f"{path.stem}_answer{path.suffix}")
        return [beside] if path.suffix in (".json", ".jsonl") and beside.is_file() else []

    def _check_unique(self, record: Record, seen: set[str], where: str) -> None:
        """UserError if a blank has the name of an earlier one: answers go by the name."""
        for name in re.findall(IDIOM, str(record.get(self.task.fields[0], ""))):
            if name in seen:
                raise UserError(f"{where}: a second blank is called {name}; number them anew")
            seen.add(name)

    def hub_record(self, record: Record, features: Any) -> Record:
        """The row of ChID on the hub, with the indices of its answers in the blanks' order."""
        return {**record, self.task.label_field: record["answers"]["candidate_id"]}

    def text(self, record: Record, where: str) -> Passages:
        self.require(record, where)
        content, candidates = self.task.fields
        passages = record[content]
        if isinstance(passages, str):
            passages = [passages]
        if not isinstance(passages, list):
            raise UserError(f"{where}: {content} must be a text or a list of texts")
        for passage in passages:
            records.checked(passage, f"{where}: {content}")
        found = self._candidates(record[candidates], where)
        blanks = tuple(self._blanks(passages))
        if not blanks:
            shown = self.task.options.get("blank", "#idiomN#")
            raise UserError(f"{where}: there is no blank ({shown}) in {content}; remove the line")
        if self._once and len(blanks) > len(found):
            raise UserError(
                f"{where}: {len(blanks)} blanks, but only {len(found)} {candidates}, and each "
                "fills at most one; add candidates, or describe a task with `once: false`"
            )
        return Passages(found, tuple(passages), blanks)

    @property
    def _once(self) -> bool:
        return bool(self.task.options.get("once", True))

    def _candidates(self, given: Any, where: str) -> tuple[str, ...]:
        name = self.task.fields[1]
        if isinstance(given, str):  # a cell of a table
            given = [one.strip() for one in given.split("|")]
        if not isinstance(given, list) or len(given) < 2:
            raise UserError(
                f"{where}: {name} must be a list of two or more texts, not {given!r:.40}; a blank "
                "can't be filled without candidates"
            )
        return tuple(
            records.checked_one(one, f"{where}: {name}, candidate {number}")
            for number, one in enumerate(given)
        )

    def _blanks(self, passages: Sequence[str]) -> Iterator[Blank]:
        marker = self.task.options.get("blank")
        pattern = re.compile(re.escape(marker) if marker is not None else IDIOM)
        number = 0
        for passage, text in enumerate(passages):
            for match in pattern.finditer(text):
                name = match[0] if marker is None else str(number)
                yield Blank(name, passage, match.start(), match.end())
                number += 1

    def label(
        self, record: Record, text: Passages, where: str, notes: Counter[str]
    ) -> dict[str, int]:
        """The index of the right candidate for the name of each blank."""
        name = self.task.label_field
        if name not in record:
            raise UserError(
                f"{where}: no field {name!r} (has {', '.join(record)}), and no file of answers "
                "beside this one ({stem}_answer.json); without answers it is only good for "
                "clue-ds predict"
            )
        given = record[name]
        if isinstance(given, list):
            if len(given) != len(text.blanks):
                raise UserError(
                    f"{where}: {len(given)} {name} for {len(text.blanks)} blanks; give one for each"
                )
            given = {blank.name: one for blank, one in zip(text.blanks, given, strict=True)}
        if not isinstance(given, dict):
            raise UserError(f"{where}: {name} must be a list of indices, or an object by blanks")
        return {b.name: self._index(given, b.name, text, where) for b in text.blanks}

    def _index(self, given: dict[str, Any], blank: str, text: Passages, where: str) -> int:
        if blank not in given:
            raise UserError(f"{where}: blank {blank} has no answer; add it, or remove the line")
        answer = given[blank]
        if isinstance(answer, str) and answer in text.candidates:
            return text.candidates.index(answer)
        wrong = answer_object.wrong_index(answer, len(text.candidates))
        if wrong:
            raise UserError(f"{where}: blank {blank}: answer {wrong}")
        return int(answer)

    # -------------------------------------------------------------------------------- inputs

    def encode(self, tokenizer: Tokenizer, text: Passages, max_length: int) -> list[BlankUnit]:
        candidates = [tokenizer.encode(one) for one in text.candidates]
        room = max_length - 4 - max(map(len, candidates))
        if room < FEWEST_TOKENS:
            raise UserError(
                f"a candidate has {max(map(len, candidates))} tokens, which leaves {room} of "
                f"{max_length} for the passage; give a larger --max-length or shorter candidates"
            )
        tokens = tokenizer.tokens
        blank_id = tokens.index(BLANK_TOKEN) if BLANK_TOKEN in tokens else tokenizer.mask_id
        cls, sep, gap = (np.array([i]) for i in (tokenizer.cls_id, tokenizer.sep_id, blank_id))
        framed = [np.concatenate([cls, one, sep]).astype(np.int32) for one in candidates]
        units = []
        for blank in text.blanks:
            left, right = self._sides(tokenizer, text, blank)
            num_left = min(len(left), max(room // 2, room - len(right)))
            num_right = min(len(right), room - num_left)
            cut = num_left + num_right < len(left) + len(right)
            passage = [left[len(left) - num_left :], gap, right[:num_right], sep]
            joined = np.concatenate(passage).astype(np.int32)
            units.append(BlankUnit(CandidateRows(framed, joined, cut)))
        return units

    @staticmethod
    def _sides(tokenizer: Tokenizer, text: Passages, blank: Blank) -> tuple[np.ndarray, np.ndarray]:
        """The tokens before and after a blank; the passage's other blanks are [MASK]."""
        masks = np.full(MASKS_OF_A_BLANK, tokenizer.mask_id)
        sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        passage, begin, side = text.passages[blank.passage], 0, 0
        for other in (one for one in text.blanks if one.passage == blank.passage):
            sides[side].append(tokenizer.encode(passage[begin : other.begin]))
            begin = other.end
            if other == blank:
                side = 1
            else:
                sides[side].append(masks)
        sides[side].append(tokenizer.encode(passage[begin:]))
        return np.concatenate(sides[0]), np.concatenate(sides[1])

    def targets(
        self, text: Passages, label: dict[str, int], units: Sequence[BlankUnit]
    ) -> list[int]:
        return [label[blank.name] for blank in text.blanks]

    def network(self, config: ModelConfig, seed: int) -> BertForMultipleChoice:
        return BertForMultipleChoice(config, seed)

    def loss(self, outputs: Tensor, units: Sequence[BlankUnit], targets: Sequence[int]) -> Tensor:
        return rating.loss(outputs, units, targets)

    # ------------------------------------------------------------------------------- answers

    def raw(self, outputs: Tensor, units: Sequence[BlankUnit]) -> list[np.ndarray]:
        return rating.ratings(outputs, units)

    def answer(
        self, text: Passages, units: Sequence[BlankUnit], raws: Sequence[np.ndarray]
    ) -> Answer:
        indices = assign(np.stack(raws), self._once)
        names = [blank.name for blank in text.blanks]
        value = dict(zip(names, indices, strict=True))
        details = {
            "label": value,
            "candidates": {name: text.candidates[i] for name, i in value.items()},
            "probabilities": {
                name: rating.probabilities(rated) for name, rated in zip(names, raws, strict=True)
            },
        }
        return Answer(value, details)

    def shown(self, text: Passages) -> str:
        return repr(text.passages[0][:40])

    # -------------------------------------------------------------------------------- scores

    def scores(self, examples: Sequence[Example], values: Sequence[dict[str, int]]) -> Scores:
        """The accuracy over blanks; a line may have several."""
        right = [
            value[name] == index
            for example, value in zip(examples, values, strict=True)
            for name, index in (example.label or {}).items()
        ]
        return {"accuracy": sum(right) / len(right)}

    def baselines(self, train: Sequence[Example], dev: Sequence[Example]) -> dict[str, Scores]:
        chances = [1 / len(e.text.candidates) for e in dev for _ in e.text.blanks]
        return {CHANCE: {"accuracy": sum(chances) / len(chances)}}

    # ----------------------------------------------------------------------------- submission

    def submission(self, examples: Sequence[Example], values: Sequence[dict[str, int]]) -> str:
        return answer_object.write({name: i for value in values for name, i in value.items()})

    def check(
        self, content: bytes, examples: Sequence[Example], where: str, is_scored: bool
    ) -> tuple[list[Any], list[str]]:
        """One JSON object from all blanks to indices, or what `clue-ds predict` writes."""

        def wrong_line(number: int, label: Any) -> str | None:
            if number >= len(examples) or not isinstance(label, dict):
                return "label must be an object from the blanks of the line to indices"
            text = examples[number].text
            if set(label) != {blank.name for blank in text.blanks}:
                return "label must have the blanks of the line, and no others"
            wrong = (answer_object.wrong_index(i, len(text.candidates)) for i in label.values())
            return next((f"label {one}" for one in wrong if one), None)

        if not is_scored and answer_object.is_lines(content):
            ids = [example.id for example in examples]
            return answer_lines.check(content, ids, where, is_scored, wrong_line)
        found, mistakes = answer_object.read(content, where)
        counts = {b.name: len(e.text.candidates) for e in examples for b in e.text.blanks}
        mistakes += answer_object.wrong_names(found, list(counts), where)
        for name, index in found.items():
            wrong = answer_object.wrong_index(index, counts.get(name, 0))
            if name in counts and wrong:
                mistakes.append(f"{where}: {name}: answer {wrong}")
        if mistakes:
            return [], mistakes
        return [{b.name: found[b.name] for b in e.text.blanks} for e in examples], []


def assign(ratings: np.ndarray, once: bool = True) -> list[int]:
    """A candidate for each blank, from ratings [blanks, candidates]; the best sum of ratings.

    `once`: no candidate for two blanks; else each blank gets the candidate with its best rating.
    """
    if not once:
        return ratings.argmax(1).tolist()
    # Imported here because it takes a moment, and only clozes need it.
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(ratings, maximize=True)
    return columns.tolist()
