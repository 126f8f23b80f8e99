"""EM and F1 of answers: the numbers of CMRC2018's script and of DRCD's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clue_ds.tasks.kinds.span import scoring


def test_golden_values_of_cmrcs_script(shared_data: Path) -> None:
    """Percent (F1, EM) on the dev set for three sets of predictions, measured with the script."""
    path = shared_data / "clue" / "cmrc2018_public" / "dev.json"
    questions = [
        (question["id"], paragraph["context"], [a["text"] for a in question["answers"]])
        for article in json.loads(path.read_text("utf-8"))["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    answers = {key: texts for key, _, texts in questions}
    golden = [
        ({key: texts[0][:-1] for key, _, texts in questions}, "86.528", "14.104"),
        ({key: context[:30] for key, context, _ in questions}, "10.740", "0.000"),
        (
            {key: t[0] for key, _, t in questions if int(key.rsplit("_", 1)[1]) % 2 == 0},
            "57.192",
            "57.192",
        ),
    ]
    for predictions, f1, exact in golden:
        score = scoring.mean(scoring.cmrc, answers, predictions)
        assert (f"{100 * score.f1:.3f}", f"{100 * score.exact:.3f}") == (f1, exact)


def test_segments_are_han_characters_and_words_of_the_rest() -> None:
    assert scoring.segments("《ω-Force》，2.Port Royal's号") == (
        "ωforce2.port", "royal", "'s", "号",
    )  # fmt: skip
    assert scoring.segments(" ……A，B ") == ("……ab",)


@pytest.mark.parametrize(
    ("answers", "prediction", "exact", "f1"),
    [
        (["光荣公司"], "光荣公司", 1, 1),
        (["光荣公司"], "《光荣》公司。", 1, 1),  # full-width punctuation doesn't count
        (["光荣公司."], "光荣公司", 0, 1 - 1 / 9),  # ASCII punctuation does
        (["KOEI"], " koei ", 1, 1),
        (["光荣公司"], "公司光荣", 0, 0.5),  # the longest common run has 2 of 4
        (["甲", "光荣"], "光荣", 1, 1),  # the best of the answers
        (["光荣"], "", 0, 0),
        (["，"], "。", 1, 0),
    ],
)
def test_cmrc(answers: list[str], prediction: str, exact: int, f1: float) -> None:
    assert scoring.cmrc(answers, prediction) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("answers", "prediction", "exact", "f1"),
    [
        (["光榮公司."], "光榮公司", 1, 1),  # ASCII punctuation doesn't count
        (["光榮公司"], "公司光榮", 0, 1),  # a bag of characters
        (["「光榮」"], "光榮", 0, 2 * 2 / 6),  # not in the list of DRCD's authors
        (["the  Koei"], "KOEI", 1, 1),
    ],
)
def test_drcd(answers: list[str], prediction: str, exact: int, f1: float) -> None:
    assert scoring.drcd(answers, prediction) == pytest.approx((exact, f1))


def test_a_question_without_a_prediction_counts_as_wrong() -> None:
    answers = {"a": ["光荣"], "b": ["东京"]}
    assert scoring.mean(scoring.cmrc, answers, {"a": "光荣"}) == (0.5, 0.5)
