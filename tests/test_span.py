"""Span reading: files of questions, windows with places in the raw text, the best answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import SPECIAL

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.tasks.kinds.span import candidates, simplify, squad, windows
from clue_ds.tasks.kinds.span.windows import Limits, Reading


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["##" + letter for letter in letters]
    words = ["caf", "##fe", "20", "##18", "(", ")", "，", "。", "?", *"0123456789"]
    han = list("战国无双由光荣开发年在东京发售谁哪里什么语汉学校")
    tokens = dict.fromkeys([*SPECIAL, *letters, *pieces, *words, *han])
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return Tokenizer(path)


def cut(tokenizer: Tokenizer, context: str, answer: str, to_simplified: bool = False) -> str:
    """The answer as it comes back: its characters -> the model's positions -> characters."""
    begin = context.index(answer)
    reading = Reading("谁?", context)
    (window,) = windows.windows(tokenizer, reading, Limits(256), to_simplified)
    first, last = windows.target(window, begin, begin + len(answer))
    assert window.first <= first <= last < window.size - 1
    place = slice(window.begins[first - window.first], window.ends[last - window.first])
    return context[place]


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("战国\u3000无双\u3000\u3000由光荣", "无双"),  # ideographic spaces
        ("战国\u3000无双\u3000\u3000由光荣", "无双\u3000\u3000由光荣"),
        ("由  光荣  开发", "光荣  开"),  # double spaces
        ("由\n光荣\u00a0开发", "光荣\u00a0开发"),
        ("由Koei在2018年", "Koei"),  # lower-cased pieces
        ("由Koei在2018年", "2018"),  # 20 ##18
        ("在Café，", "Café"),  # é is one character, which lower-casing makes two
        ("在Cafe\u0301，", "Cafe\u0301"),  # an accent of its own belongs to its letter
        ("由😀龘在", "😀龘"),  # [UNK]
        ("由光\u200b荣\u200b在", "光\u200b荣"),  # a character that nobody sees
        ("由光\u200b荣\u200b在", "荣"),
        ("由ko\u200bei在", "ko\u200bei"),
        ("在한국，", "한국"),  # a syllable becomes several letters
        ("由ＫＯＥＩ（光荣）", "ＫＯＥＩ"),  # full width
        ("由ω-force开发", "ω-force"),
        ("战国\ufffd无双", "国\ufffd无"),
    ],
)
def test_answers_are_cut_from_the_raw_text(context: str, answer: str, tokenizer: Tokenizer) -> None:
    assert cut(tokenizer, context, answer) == answer


def test_places_agree_with_the_library_on_every_context(shared_data: Path) -> None:
    """Offsets of transformers' tokenizer; it leaves a combining mark out of the token before it."""
    import transformers

    vocab = shared_data / "vocab" / "vocab_clue.txt"
    ours = Tokenizer(vocab)
    theirs = transformers.BertTokenizerFast(str(vocab), split_special_tokens=True)
    content = json.loads((shared_data / "clue/cmrc2018_public/dev.json").read_text("utf-8"))
    contexts = [p["context"] for article in content["data"] for p in article["paragraphs"]][:200]
    contexts.append("\u200b 双\u200b ko\u200bei한국 Café ＫＯ\ufffd ")
    for context in contexts:
        ids, begins, ends = windows.tokens_with_places(ours, context)
        expected = theirs(context, add_special_tokens=False, return_offsets_mapping=True)
        assert ids.tolist() == expected["input_ids"]
        assert list(zip(begins, ends, strict=True)) == expected["offset_mapping"]


# ------------------------------------------------------------------------------------- windows


def test_windows_have_every_token_and_each_begins_answers_in_one_of_them(
    tokenizer: Tokenizer,
) -> None:
    context = "战国无双由光荣开发" * 9
    reading = Reading("谁开发?", context)
    found = windows.windows(tokenizer, reading, Limits(30, stride=8))
    assert all(window.size <= 30 and not window.truncated for window in found)
    assert len(found) == 9
    starts = [int(window.begins[0]) for window in found]
    assert starts == list(range(0, 65, 8))
    seen = Counter(b for w in found for b in w.begins[w.is_best].tolist())
    assert seen == Counter(range(len(context)))
    assert found[1].is_best.nonzero()[0].tolist() == list(range(8, 16))


def test_an_answer_that_a_window_does_not_have_whole_is_at_its_cls(tokenizer: Tokenizer) -> None:
    found = windows.windows(tokenizer, Reading("谁", "战国无双由光荣开发"), Limits(8, stride=4))
    assert [(int(w.begins[0]), int(w.ends[-1])) for w in found] == [(0, 4), (4, 8), (8, 9)]
    assert windows.target(found[0], 2, 5) == (0, 0)
    assert windows.target(found[0], 2, 4) == (found[0].first + 2, found[0].first + 3)


def test_a_question_that_is_too_long_is_cut_and_leaves_half_for_the_context(
    tokenizer: Tokenizer,
) -> None:
    reading = Reading("谁" * 200, "战国无双" * 20)
    (window, *_) = windows.windows(tokenizer, reading, Limits(160))
    assert window.first == 64 + 2 and window.truncated
    found = windows.windows(tokenizer, reading, Limits(33, stride=100))
    assert found[0].first == 15 + 2
    assert sorted({b for w in found for b in w.begins.tolist()}) == list(range(80))


# ----------------------------------------------------------------------------------- the answer


def test_the_best_spans_are_those_of_an_exhaustive_search() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(40, 2)).astype(np.float32)
    is_best = draw.random(40) < 0.7
    expected = sorted(
        (
            (float(logits[i, 0] + logits[j, 1]), i, j)
            for i in range(40)
            for j in range(i, min(i + 6, 40))
            if is_best[i]
        ),
        reverse=True,
    )[:20]
    found = candidates.best_spans(logits, is_best, 6, 20)
    assert [(s, int(i), int(j)) for i, j, s in found.tolist()] == expected
    few = candidates.best_spans(logits[:2], np.array([True, True]), 50, 20)
    assert len(few) == 3
    assert len(candidates.best_spans(logits[:2], np.array([False, False]), 50, 20)) == 0


def test_equal_answers_of_several_windows_count_once(tokenizer: Tokenizer) -> None:
    context = "光荣由光荣"
    (window,) = windows.windows(tokenizer, Reading("谁", context), Limits(64))
    spans = np.array([[0, 1, 3.0], [3, 4, 2.0], [2, 2, 1.0]])
    found = candidates.candidates(context, [window, window], [spans, spans], 20)
    assert [(one.text, one.begin, one.score) for one in found] == [("光荣", 0, 3.0), ("由", 2, 1.0)]
    listed = candidates.listed(found)
    assert sum(one["probability"] for one in listed) == pytest.approx(1)
    assert listed[0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)))


# ------------------------------------------------------------------------------ traditional text


def test_traditional_text_is_read_simplified_and_answered_as_it_was(tokenizer: Tokenizer) -> None:
    context = "戰國無雙由光榮開發，學漢語"
    assert simplify.simplify(context).text == "战国无双由光荣开发，学汉语"
    assert cut(tokenizer, context, "光榮開發", to_simplified=True) == "光榮開發"
    ids, _, _ = windows.tokens_with_places(tokenizer, context, to_simplified=True)
    assert tokenizer.unk_id not in ids.tolist()


def test_a_conversion_that_changes_lengths_keeps_the_places() -> None:
    """No phrase of today's table does, but others may: each part stands for what it came from."""

    def convert(text: str) -> str:
        return text.replace("軟體", "软件包").replace("甲乙", "丙").replace("丁", "")

    original = "他用軟體。甲乙丁戊，軟體好"
    found = simplify.simplify(original, convert)
    assert found.text == "他用软件包。丙戊，软件包好"
    for part, source in {
        "软件包": "軟體",
        "丙": "甲乙丁",
        "戊": "戊",
        "好": "好",
        "他用": "他用",
    }.items():
        begin = found.text.rindex(part)
        end = begin + len(part)
        assert original[found.begins[begin] : found.ends[end - 1]] == source, part


# ----------------------------------------------------------------------------------- the files


def write_squad(path: Path, *questions: dict[str, Any], context: str = "光荣在东京，光荣") -> Path:
    content = {"version": "1", "data": [{"paragraphs": [{"context": context, "qas": questions}]}]}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def gold(record: dict[str, Any], notes: Counter[str], skips: bool = False) -> squad.Gold | None:
    reading = squad.reading_of(record, "f: question 1")
    return squad.gold_of(record, reading, "f: question 1", notes, skips)


def test_a_wrong_place_is_corrected_to_the_nearest_and_counted(tmp_path: Path) -> None:
    answers = [{"text": "光荣", "answer_start": start} for start in (0, 5, 2, -1)]
    path = write_squad(
        tmp_path / "a.json",
        *({"id": str(i), "question": "谁?", "answers": [a]} for i, a in enumerate(answers)),
    )
    notes: Counter[str] = Counter()
    found = [gold(record, notes) for _, record in squad.squad_records(path)]
    assert [one.begin for one in found if one is not None] == [0, 6, 0, 0]
    assert notes == {squad.CORRECTED: 3}


def test_forms_of_answers_and_questions_that_are_left_out() -> None:
    notes: Counter[str] = Counter()
    record = {"question": "谁?", "context": "  光荣 在东京"}
    hub = {**record, "answers": {"text": ["东京", "x"], "answer_start": [5, 0]}}
    assert gold(hub, notes) == squad.Gold(["东京", "x"], 6, 8)
    spaces = {**record, "answers": [{"text": " 光荣 ", "answer_start": 1}]}
    assert gold(spaces, notes) == squad.Gold([" 光荣 "], 2, 4)
    assert gold({**record, "answers": [], "is_impossible": True}, notes) is None
    assert gold({**record, "answers": [{"text": "无", "answer_start": 1}]}, notes, True) is None
    assert notes == {squad.CORRECTED: 1, squad.ABSENT: 1, squad.UNANSWERABLE: 1, squad.LEFT_OUT: 1}


ANSWER = {"text": "光荣", "answer_start": 0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": " \u3000", "context": "文"}, "the question is empty; give it a text"),
        ({"question": "谁", "context": "\u200b\n"}, "the context is empty; give it a text"),
        ({"question": 1, "context": "文"}, "question 1 is not text"),
        ({"answers": "光荣"}, "answers must be a list of"),
        ({"answers": []}, "the list of answers is empty; add an answer, or remove"),
        ({"answers": [{"answer_start": 1}]}, "an answer needs a 'text'"),
        ({"answers": [{**ANSWER, "text": ""}]}, "an answer is empty; write its text"),
        ({"answers": [{**ANSWER, "answer_start": "0"}]}, "answer_start '0' must be a whole number"),
        ({"answers": [{**ANSWER, "text": "没有"}]}, "'没有' is not in the context; write it as"),
        ({"answers": None}, "answers must be a list of"),
        ({}, "no field 'answers' .*only good for clue-ds predict"),
        (
            {"answers": [{"text": "FAKE_ANSWER_1", "answer_start": -1}] * 3},
            "FAKE_ANSWER_1 is a placeholder, so the file is only good for clue-ds predict",
        ),
    ],
)
def test_each_mistake_names_the_question(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"f: question 1: .*{message}"):
        gold({"question": "谁?", "context": "光荣在东京", **record}, Counter())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [', r"a\.json:1: not JSON: Expecting value at character"),
        ("[]", r"a\.json: no 'data'; SQuAD's format is"),
        ('{"data": {}}', r"a\.json: 'data' must be a list"),
        ('{"data": [{"paragraphs": [1]}]}', r"data\[0\], paragraphs\[0\]: must be an object"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', r"paragraphs\[0\]: no 'context' \(has qas"),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": 1}]}]}]}',
            r"qas\[0\]: no 'question' \(has id",
        ),
    ],
)
def test_a_file_of_another_form_is_explained(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        list(squad.squad_records(path))


def test_two_questions_with_one_id_are_refused(tmp_path: Path) -> None:
    question = {"id": "7", "question": "谁?", "answers": [ANSWER]}
    path = write_squad(tmp_path / "a.json", question, {**question, "id": 7})
    with pytest.raises(UserError, match="two questions have the id 7; rename one"):
        list(squad.squad_records(path))


def test_clues_files_are_read_whole(shared_data: Path) -> None:
    """The counts of CLUE, of wrong places, and of answers that no context has."""
    folder = shared_data / "clue" / "cmrc2018_public"
    expected = {"train": (10_142, 21, 0), "dev": (3_219, 7, 193)}
    for split, (num_questions, num_corrected, num_absent) in expected.items():
        notes: Counter[str] = Counter()
        found = [
            squad.gold_of(record, squad.reading_of(record, where), where, notes)
            for where, record in squad.squad_records(folder / f"{split}.json")
        ]
        assert len(found) == num_questions and None not in found
        assert (notes[squad.CORRECTED], notes[squad.ABSENT]) == (num_corrected, num_absent)
    where, record = next(squad.squad_records(folder / "test.json"))
    with pytest.raises(UserError, match="question TEST_0_QUERY_0: .* is a placeholder"):
        squad.answers_of(record, where)
