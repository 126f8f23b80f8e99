"""Exact match and F1 of answers, as two scorers compute them.

    cmrc   the script of CMRC2018, which CLUE runs on CMRC2018 and DRCD
    drcd   the script of DRCD's authors: SQuAD's, with characters as tokens

Guarantees: `cmrc` gives the numbers of the script, with one exception. The script lets nltk cut
runs of Latin text into sentences before it cuts them into words, which needs data that nltk
downloads from a server. Here such a run counts as one sentence, so only a full stop inside the run
can make a difference. A question without a prediction counts as wrong.

The two differ most in F1: `cmrc` takes the longest run of segments that two answers share, `drcd`
takes all characters that they share, in any order.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

# The script lists "……" too, but it compares single characters, so that never matches.
CMRC_REMOVED = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
# SQuAD's ASCII punctuation and the full-width marks that DRCD's authors name in their issue 6.
DRCD_REMOVED = frozenset(string.punctuation + "《》？，。、；：")
ARTICLES = re.compile(r"\b(a|an|the)\b")  # SQuAD's script drops these words


class Score(NamedTuple):
    """Fractions from 0 to 1."""

    exact: float
    f1: float


Scorer = Callable[[Sequence[str], str], Score]


def cmrc(answers: Sequence[str], prediction: str) -> Score:
    """The best score of a prediction over the answers of its question."""
    exact = any(_stripped(answer) == _stripped(prediction) for answer in answers)
    return Score(float(exact), max(_cmrc_f1(answer, prediction) for answer in answers))


def _stripped(text: str) -> str:
    return "".join(char for char in text.lower().strip() if char not in CMRC_REMOVED)


@functools.lru_cache(maxsize=1 << 14)  # the answers of a dev set, which every epoch compares
def segments(text: str) -> tuple[str, ...]:
    """Each Han character alone, and the words of the text between them, without punctuation."""
    found: list[str] = []
    latin = ""
    for char in _stripped(text):
        if "\u4e00" <= char <= "\u9fa5":
            found += [*_words(latin), char]
            latin = ""
        else:
            latin += char
    return (*found, *_words(latin))


def _words(latin: str) -> list[str]:
    if latin.isalnum() or not latin:
        return [latin] if latin else []
    return _nltk_words(latin)


@functools.cache
def _nltk_tokenizer() -> Callable[[str], list[str]]:
    # Imported here because it takes a second, and only the scores of span tasks need it.
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer().tokenize


def _nltk_words(latin: str) -> list[str]:
    return _nltk_tokenizer()(latin)


def _cmrc_f1(answer: str, prediction: str) -> float:
    first, second = segments(answer), segments(prediction)
    return _f1(longest_common_run(first, second), len(first), len(second))


def longest_common_run(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest run of consecutive items that both sequences have."""
    longest = 0
    before = [0] * (len(second) + 1)  # lengths of the runs that end at each pair of items
    for one in first:
        now = [0] * (len(second) + 1)
        for place, other in enumerate(second):
            if one == other:
                now[place + 1] = before[place] + 1
        longest = max(longest, *now)
        before = now
    return longest


def _f1(shared: int, num_first: int, num_second: int) -> float:
    # 2PR / (P + R) with P = shared / num_second and R = shared / num_first.
    return 2 * shared / (num_first + num_second) if shared else 0.0


def drcd(answers: Sequence[str], prediction: str) -> Score:
    """The best score of a prediction over the answers of its question."""
    given = normalized(prediction)
    exact, f1 = False, 0.0
    for answer in map(normalized, answers):
        exact = exact or answer == given
        shared = sum((Counter(answer) & Counter(given)).values())
        f1 = max(f1, _f1(shared, len(answer), len(given)))
    return Score(float(exact), f1)


def normalized(text: str) -> str:
    """SQuAD's normal form of an answer: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(char for char in text.lower() if char not in DRCD_REMOVED)
    return " ".join(ARTICLES.sub(" ", kept).split())


SCORERS: dict[str, Scorer] = {"cmrc": cmrc, "drcd": drcd}


def mean(
    scorer: Scorer, answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str]
) -> Score:
    """The mean score over all questions of `answers`: id -> answers, id -> prediction."""
    scores = [
        scorer(answers[key], predictions[key]) if key in predictions else Score(0.0, 0.0)
        for key in answers
    ]
    return Score(
        sum(score.exact for score in scores) / len(scores),
        sum(score.f1 for score in scores) / len(scores),
    )
