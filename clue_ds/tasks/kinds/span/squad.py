"""Read questions with their contexts and answers: SQuAD's JSON, or a record a line.

    {"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers": [...]}]}]}]}
    {"id", "question", "context", "answers": [{"text", "answer_start"}]}

CMRC2018, DRCD and SQuAD itself are files of the first form. The second is a line of a JSON lines
file, a request of `clue-ds serve`, or a row of the hub, where "answers" is {"text": [...],
"answer_start": [...]}. `answer_start` counts characters (code points) of the context.

A wrong `answer_start` is corrected: the answer is searched for, and the place that is nearest to
the given one counts. That is needed for 21 of CMRC2018's training questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clue_ds.errors import UserError, shorten
from clue_ds.tasks import lines
from clue_ds.tasks.kinds.span.windows import Reading, is_blank

Record = dict[str, Any]

FIELDS = ("question", "context")
ANSWERS = "answers"
# What is counted and printed; the number comes first.
CORRECTED = "answer(s) not at their answer_start: the nearest place with their text is used"
ABSENT = "further answer(s) not in their context: they count only when predictions are scored"
UNANSWERABLE = "question(s) without an answer (is_impossible): left out"
LEFT_OUT = "question(s) whose answers are not in their context: left out"
_PLACEHOLDER = re.compile(r"FAKE_ANSWER_\d+")
_UNLABELLED = "the file is only good for clue-ds predict and submit"


class Gold(NamedTuple):
    """The right answers to a question, and the place of the first one that is in the context."""

    answers: list[str]
    begin: int  # characters begin..end of the context are the answer to train on
    end: int


def squad_records(path: Path) -> Iterator[tuple[str, Record]]:
    """(where, record) of each question of a file in SQuAD's JSON.

    `where` names the file and the question's id. A UserError names the place in the file for what
    is not JSON or not in this form.
    """
    content = lines.json_file(path)
    ids: set[str] = set()
    for article_where, article in _items(content, "data", f"{path}"):
        for where, paragraph in _items(article, "paragraphs", article_where):
            context = _value(paragraph, "context", where)
            for question_where, question in _items(paragraph, "qas", where):
                _value(question, "question", question_where)
                key = len(ids) if question.get("id") is None else question["id"]
                if str(key) in ids:
                    raise UserError(
                        f"{path}: two questions have the id {shorten(key, limit=60)}; rename one"
                    )
                ids.add(str(key))
                place = f"{path}: question {shorten(key, quoted=False, limit=60)}"
                yield place, {**question, "id": key, "context": context}


def _items(parent: Any, name: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each item of the list `name`."""
    items = _value(parent, name, where)
    if not isinstance(items, list):
        raise UserError(f"{where}: {name!r} must be a list, not {shorten(items, limit=40)}")
    for number, item in enumerate(items):
        place = f"{where}, {name}[{number}]"
        if not isinstance(item, dict):
            raise UserError(f"{place}: must be an object, not {shorten(item, limit=40)}")
        yield place, item


def _value(parent: Any, name: str, where: str) -> Any:
    if not isinstance(parent, dict) or name not in parent:
        has = f" (has {', '.join(parent)})" if isinstance(parent, dict) else ""
        raise UserError(
            f"{where}: no {name!r}{has}; SQuAD's format is data > paragraphs > context and qas > "
            "question and answers (docs/tasks/span.md)"
        )
    return parent[name]


def reading_of(record: Record, where: str) -> Reading:
    """The question and context of a record, which has both. A UserError begins with `where`."""
    for name in FIELDS:
        value = record[name]
        if not isinstance(value, str):
            raise UserError(f"{where}: {name} {shorten(value, limit=40)} is not text")
        if is_blank(value):
            raise UserError(f"{where}: the {name} is empty; give it a text, or remove the question")
    return Reading(record["question"], record["context"])


def answers_of(record: Record, where: str) -> list[tuple[str, int]] | None:
    """(text, answer_start) of each answer of a record; None if it says that there is no answer."""
    if ANSWERS not in record:
        raise UserError(
            f"{where}: no field {ANSWERS!r} (has {', '.join(record)}); without it, {_UNLABELLED}"
        )
    given = _as_list(record[ANSWERS])
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise UserError(
            f'{where}: {ANSWERS} must be a list of {{"text": ..., "answer_start": ...}}, not '
            f"{shorten(given, limit=60)}"
        )
    if not given:
        if record.get("is_impossible") is True:
            return None
        raise UserError(
            f"{where}: the list of answers is empty; add an answer, or remove the question "
            f"(a question without an answer has is_impossible: true). Without answers, "
            f"{_UNLABELLED}"
        )
    found = [_answer(one, where) for one in given]
    if all(_PLACEHOLDER.fullmatch(text) and start < 0 for text, start in found):
        raise UserError(f"{where}: the answer {found[0][0]} is a placeholder, so {_UNLABELLED}")
    return found


def _as_list(given: Any) -> Any:
    """The hub's {"text": [...], "answer_start": [...]} as a list of answers; all else as it is."""
    if not isinstance(given, dict) or not all(isinstance(one, list) for one in given.values()):
        return given
    if len({len(one) for one in given.values()}) > 1:
        return given
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def _answer(given: dict[str, Any], where: str) -> tuple[str, int]:
    text, start = given.get("text"), given.get("answer_start", -1)
    if not isinstance(text, str):
        raise UserError(f"{where}: an answer needs a 'text', which is a string: {shorten(given)}")
    if is_blank(text):
        raise UserError(f"{where}: an answer is empty; write its text, or remove it")
    if not isinstance(start, int) or isinstance(start, bool):
        raise UserError(
            f"{where}: answer_start {shorten(start, limit=40)} must be a whole number: the place "
            "of the answer's first character in the context, from 0"
        )
    return text, start


def gold_of(
    record: Record, reading: Reading, where: str, notes: Counter[str], skips_absent: bool = False
) -> Gold | None:
    """The answers of a record; None if the question is left out, which `notes` counts.

    A UserError begins with `where`: no answer is in the context (with `skips_absent`, that question
    is left out), or the answers are missing or not in the right form.
    """
    answers = answers_of(record, where)
    if answers is None:
        notes[UNANSWERABLE] += 1
        return None
    place, num_absent = None, 0
    for text, start in answers:
        begin = nearest(reading.context, text, start)
        if begin is None:
            num_absent += 1
        else:
            if begin != start:
                notes[CORRECTED] += 1
            place = place or _visible(reading.context, begin, begin + len(text))
    if place is not None:
        if num_absent:
            notes[ABSENT] += num_absent
        return Gold([text for text, _ in answers], *place)
    if not skips_absent:
        raise UserError(
            f"{where}: the answer {shorten(answers[0][0], limit=60)} is not in the context; write "
            "it as it is there, remove the question, or set `absent_answers: skip` in the task's "
            "YAML file to leave out all such questions"
        )
    notes[LEFT_OUT] += 1
    return None


def nearest(context: str, text: str, start: int) -> int | None:
    """Where `text` begins in `context`, at `start` or as near to it as possible."""
    if start >= 0 and context.startswith(text, start):
        return start
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    return min(places, key=lambda place: abs(place - start)) if places else None


def _visible(context: str, begin: int, end: int) -> tuple[int, int]:
    """The span without the spaces and invisible characters at its ends, which make no tokens."""
    while is_blank(context[begin]):
        begin += 1
    while is_blank(context[end - 1]):
        end -= 1
    return begin, end
