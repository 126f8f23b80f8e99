"""Damaged and odd files of tasks: each is read, or refused with one UserError that names the place.

CLUE_DS_FUZZ is the number of inputs for each property (default 100).
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clue_ds.errors import UserError
from clue_ds.tasks import examples, kinds, registry
from clue_ds.tasks.kinds import Example
from clue_ds.tasks.kinds.classify import CustomTask
from clue_ds.tasks.predict import submit

FUZZ = settings(
    max_examples=int(os.environ.get("CLUE_DS_FUZZ", "100")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# ------------------------------------------------------------------------------------ the inputs

PIECES = st.sampled_from(
    ["", " ", "文", "a", "\ufeff", "\u2028", "\x00", "\ud800", '"', "\r", "\t", "-", "100", "true"]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=5).map("".join)
HUGE = 10**9  # stands for a number of 5,000 digits, which Python refuses to convert
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 120), st.floats(), TEXTS,
    st.sampled_from(["100", "101", "0", "1", "neutral", "entailment", "-", "true", HUGE]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "id", "idx", "label", "label_desc", "sentence", "sentence1", "sentence2", "keyword", "abst",
    "text", "target", "keywords", "question", "choice", "answer", "content", "candidates",
    "answers",
)  # fmt: skip
SPAN = {"span1_text": "甲", "span1_index": 0, "span2_text": "乙", "span2_index": 1}
GOOD: dict[str, dict[str, Any]] = {
    "tnews": {"sentence": "文", "label": "100"},
    "cmnli": {"sentence1": "甲", "sentence2": "乙", "label": "neutral"},
    "csl": {"keyword": ["词"], "abst": "文", "label": "1"},
    "cluewsc2020": {"text": "甲乙", "target": SPAN, "label": "true"},
}


def dumped(value: Any) -> str:
    """JSON as Python's json writes it, with NaN, lone surrogates, and numbers of any size."""
    return json.dumps(value, ensure_ascii=False).replace(str(HUGE), "9" * 5000)


# Kinds whose answer is one of several choices.
RATED: dict[str, dict[str, Any]] = {
    "c3": {"text": ["甲"], "question": "乙", "choice": ["丙", "丁"], "answer": "丁"},
    "chid": {"content": ["甲#idiom000001#乙"], "candidates": ["丙", "丁"], "answers": [1]},
}


@st.composite
def rows(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """A good record in which a few fields are missing or replaced."""
    row = dict(good)
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=2)):
        value = draw(VALUES)
        if name == "target" and isinstance(value, str | int):
            row[name] = {**SPAN, draw(st.sampled_from(sorted(SPAN))): value}
        elif draw(st.booleans()):
            row[name] = value
        else:
            row.pop(name, None)
    return row


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with at most three bytes changed, a part cut out, or another put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(["flip", "cut", "insert"]))
        if what == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        else:
            odd = draw(
                st.sampled_from(
                    [b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"[", b"[" * 5000, b'"', b"\x00",
                     b"{}\n", b"null\n", b"\xed\xa0\x80"]
                )
            )  # fmt: skip
            data[place:place] = odd
    return bytes(data)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@st.composite
def json_lines(draw: st.DrawFn, good: dict[str, Any]) -> bytes:
    lines = [dumped(row) for row in draw(st.lists(rows(good), max_size=4))]
    end = draw(st.sampled_from(["\n", "\r\n", " \n", "\n\n", ""]))
    return draw(damaged(encoded("".join(line + end for line in lines))))


@st.composite
def tables(draw: st.DrawFn, good: dict[str, Any], separator: str) -> bytes:
    names = draw(st.permutations(sorted(good)))
    names += draw(st.lists(st.sampled_from(FIELDS), max_size=1))
    lines = [separator.join(names)]
    for _ in range(draw(st.integers(0, 3))):
        cells = [str(good[name]) if name in good else draw(TEXTS) for name in names]
        cells[draw(st.integers(0, len(cells) - 1))] = draw(TEXTS | st.just('"一\n二"'))
        lines.append(separator.join(cells))
    return draw(damaged(encoded("\n".join(lines))))


# ------------------------------------------------------------------------------- the properties


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def outcome(call: Any, file: Path) -> Any:
    """What the call returns, or None after a UserError that names the file and says something."""
    try:
        return call()
    except UserError as error:
        text = str(error)
        assert file.name in text, text
        assert len(text) < 20_000 and "Traceback" not in text
        text.encode("utf-8", "surrogateescape" if "\\" in text else "surrogatepass")
        return None


@FUZZ
@given(st.data(), st.sampled_from(sorted(GOOD)), st.sampled_from(["json", "csv", "tsv"]))
def test_label_files(place: Path, data: st.DataObject, name: str, suffix: str) -> None:
    path = place / f"labels.{suffix}"
    separators = {"csv": ",", "tsv": "\t"}
    good = GOOD[name]
    strategy = json_lines(good) if suffix == "json" else tables(good, separators[suffix])
    path.write_bytes(data.draw(strategy))
    task = registry.get(name)
    for labelled in (True, False):
        found = outcome(lambda: examples.read(task, path, labelled), path)  # noqa: B023
        for example in found or []:
            texts = example.text if isinstance(example.text, tuple) else (example.text,)
            assert all(isinstance(text, str) for text in texts) and any(map(str.strip, texts))
            assert example.label in (task.labels if labelled else (None,))
            assert isinstance(example.id, int | str) and not isinstance(example.id, bool)


def c3s_array(row: dict[str, Any]) -> Any:
    """A question in the form of CLUE's own files."""
    return [[row.get("text"), [{k: v for k, v in row.items() if k != "text"}], "1"]]


@FUZZ
@given(st.data(), st.sampled_from(sorted(RATED)))
def test_files_of_choices(place: Path, data: st.DataObject, name: str) -> None:
    path = place / "choices.json"
    good = RATED[name]
    if name == "c3" and data.draw(st.booleans()):
        row = data.draw(rows(good))
        path.write_bytes(data.draw(damaged(encoded(dumped(c3s_array(row))))))
    else:
        path.write_bytes(data.draw(json_lines(good)))
    task = registry.get(name)
    for example in outcome(lambda: examples.read(task, path), path) or []:
        text = example.text
        right = [example.label] if name == "c3" else list(example.label.values())
        choices = text.choices if name == "c3" else text.candidates
        assert right and all(0 <= i < len(choices) and isinstance(i, int) for i in right)
    for example in outcome(lambda: examples.read(task, path, labelled=False), path) or []:
        assert example.label is None


@FUZZ
@given(st.data(), st.sampled_from(sorted(RATED)), st.booleans())
def test_files_of_answers_of_choices(
    place: Path, data: st.DataObject, name: str, is_scored: bool
) -> None:
    """A file of answers gives valid answers or mistakes, whatever is in it."""
    kind = kinds.of(registry.get(name))
    text = kind.text(RATED[name], "")
    asked = [Example(0, text, None)]
    value = 1 if name == "c3" else {"#idiom000001#": 1}
    good: Any = {"id": 0, "label": value} if name == "c3" or not is_scored else value
    changed = {**good, data.draw(st.sampled_from(["label", "#idiom000001#"])): data.draw(VALUES)}
    content = encoded(dumped(data.draw(st.sampled_from([good, changed]))))
    values, mistakes = kind.check(data.draw(damaged(content)), asked, "answers", is_scored)
    assert mistakes or kind.submission(asked, values) in (
        kind.submission(asked, [one]) for one in ([0, 1] if name == "c3" else
                                                  [{"#idiom000001#": i} for i in (0, 1)])
    )  # fmt: skip
    "".join(mistakes).encode("utf-8", "surrogatepass")


QUESTION: dict[str, Any] = {
    "id": "7", "question": "谁", "context": "甲乙", "answers": [{"text": "乙", "answer_start": 0}],
}  # fmt: skip


def squad(row: dict[str, Any]) -> Any:
    """A question in SQuAD's form."""
    inner = {name: value for name, value in row.items() if name != "context"}
    outer = {name: value for name, value in row.items() if name == "context"}
    return {"data": [{"paragraphs": [{**outer, "qas": [inner]}]}]}


@FUZZ
@given(st.data(), st.booleans())
def test_files_of_questions(place: Path, data: st.DataObject, is_squad: bool) -> None:
    path = place / "questions.json"
    row = {**QUESTION, **data.draw(st.dictionaries(st.sampled_from(sorted(QUESTION)), VALUES))}
    content = encoded(dumped(squad(row) if is_squad else row))
    path.write_bytes(data.draw(damaged(content)))
    task = registry.get("cmrc2018")
    for example in outcome(lambda: examples.read(task, path), path) or []:
        question, context = example.text
        answers, begin, end = example.label
        assert question.strip() and 0 <= begin < end <= len(context)
        assert any(context[begin:end] in answer for answer in answers)
    for example in outcome(lambda: examples.read(task, path, labelled=False), path) or []:
        assert example.label is None


@FUZZ
@given(st.data(), st.booleans())
def test_files_of_answers_to_questions(place: Path, data: st.DataObject, is_scored: bool) -> None:
    """A file of answers gives valid answers or mistakes, whatever is in it."""
    kind = kinds.of(registry.get("cmrc2018"))
    asked = [Example("7", kind.text(QUESTION, ""), None)]
    good: Any = {"7": "乙"} if is_scored else {"id": "7", "answer": "乙"}
    changed = {**good, data.draw(st.sampled_from(["7", "id", "answer"])): data.draw(VALUES)}
    content = encoded(dumped(data.draw(st.sampled_from([good, changed]))))
    values, mistakes = kind.check(data.draw(damaged(content)), asked, "answers", is_scored)
    assert mistakes or (len(values) == 1 and isinstance(values[0], str))
    "".join(mistakes).encode("utf-8", "surrogatepass")


@FUZZ
@given(st.data())
def test_mistakes_in_a_line_name_the_line(place: Path, data: st.DataObject) -> None:
    """One line of three is spoiled: the file is read, or the message has the number of the line."""
    path = place / "line.json"
    good = encoded(dumped(GOOD["tnews"]))
    spoiled = data.draw(damaged(good)).replace(b"\n", b"")
    path.write_bytes(b"\n".join([good, spoiled, good]) + b"\n")
    try:
        examples.read(registry.get("tnews"), path)
    except UserError as error:
        assert str(error).startswith(f"{path}:2: ")


@pytest.fixture(scope="module")
def clue(place: Path) -> Path:
    folder = place / "clue" / "cmnli_public"
    folder.mkdir(parents=True)
    lines = [dumped({"id": i, "sentence1": "甲", "sentence2": "乙"}) for i in range(3)]
    (folder / "test.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return place / "clue"


@st.composite
def answer_files(draw: st.DrawFn) -> bytes:
    lines = []
    for number in range(3):
        row: dict[str, Any] = {"id": number, "label": "neutral"}
        if draw(st.integers(0, 5)) == 0:
            row[draw(st.sampled_from(["id", "label"]))] = draw(VALUES)
        lines.append(dumped(row))
    content = encoded("\n".join(lines) + draw(st.sampled_from(["\n", "", "\n\n", "\r\n"])))
    return draw(st.just(content) | damaged(content))


NAMES = st.sampled_from(
    ["cmnli_predict.json"] * 5
    + ["wsc_predict.json", "a/cmnli_predict.json", " ", "../x", "ocnli_predict.json", "文.json"]
)


@st.composite
def zips(draw: st.DrawFn) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", draw(st.sampled_from([0, 8, 12, 14]))) as archive:
        for name in draw(st.lists(NAMES, max_size=2)):
            archive.writestr(name, draw(answer_files()))
    content = stream.getvalue()
    return draw(st.just(content) | damaged(content) | st.binary(max_size=50))


def is_right(content: bytes) -> bool:
    """An own reading of what the scorer accepts: three lines, each with the label of its line."""
    lines = content.removesuffix(b"\n").split(b"\n")
    rows = [json.loads(line) for line in lines]
    return [row["id"] for row in rows] == [0, 1, 2] and all(
        row["label"] in registry.get("cmnli").labels for row in rows
    )


@FUZZ
@given(content=zips())
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips_for_check(place: Path, clue: Path, content: bytes) -> None:
    path = place / "s.zip"
    path.write_bytes(content)
    before = sorted(place.rglob("*"))
    found = outcome(lambda: submit.check_zip(path, submit.Names(clue)), path)
    assert sorted(place.rglob("*")) == before and path.read_bytes() == content
    for test in found or []:
        assert is_right(zipfile.ZipFile(path).read(test.name))


@FUZZ
@given(content=answer_files())
def test_prediction_files(place: Path, clue: Path, content: bytes) -> None:
    folder, target = place / "answers", place / "out.zip"
    folder.mkdir(exist_ok=True)
    target.unlink(missing_ok=True)
    (folder / "cmnli_predict.json").write_bytes(content)
    before = sorted(place.rglob("*"))
    try:
        submit.submit(clue, target, predictions=folder)
    except UserError as error:
        assert "cmnli_predict.json" in str(error)
        assert sorted(place.rglob("*")) == before, "something was written"
    else:
        assert is_right(zipfile.ZipFile(target).read("cmnli_predict.json"))


YAML_VALUES = st.sampled_from(
    ["mine", "tnews", "[a]", "[a, b]", "[a, b, c]", "[]", "[1, 2]", "[1.5, yes]", "[~, a]", "~",
     "0", "-1", "1e-4", "1e400", ".nan", ".inf", "{a: b}", "'", "[", "!!python/object:os.system x",
     "*x", "&x [a, b]", "2020-13-45", "\t", "文", "'a b'", "..", "a/b", "[a, a]", "0x1F", "1_0"]
)  # fmt: skip
KEYS = st.sampled_from(sorted({*CustomTask.model_fields, "lable", "文", "? a", "<<"}))


@FUZZ
@given(st.data())
def test_task_files(place: Path, data: st.DataObject) -> None:
    path = place / "task.yaml"
    keys = {"name": "mine", "text": "[a]", "labels": "[x, y]"}
    keys.update(data.draw(st.dictionaries(KEYS, YAML_VALUES, max_size=3)))
    for key in data.draw(st.lists(st.sampled_from(sorted(keys)), max_size=1)):
        del keys[key]
    content = encoded("".join(f"{key}: {value}\n" for key, value in keys.items()))
    path.write_bytes(data.draw(st.just(content) | damaged(content)))
    task = outcome(lambda: registry.get(path), path)
    if task is not None:
        assert len(set(task.labels)) == len(task.labels) >= 2
        assert re.fullmatch(r"[A-Za-z0-9][\w.-]*", task.name) and task.name not in registry.TASKS
        for option in (task.settings, task.small_settings):
            assert option is not None and 0 < option.lr < float("inf") and option.epochs >= 1
