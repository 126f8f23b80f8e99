"""F1 of entities, counted in both ways that are published for CLUENER.

    text sets   CLUENER's leaderboard. A line's entities of a type are a set of texts: where they
                stand and how often is not looked at. The score is the mean F1 over the types.
    spans       The baselines' and CoNLL's. An entity counts if its type, start and end are right;
                one F1 over all of them (micro).

A type that is in no line and is never predicted has no F1 and is left out of the mean; a type that
is never predicted has F1 0 (CLUENER's script divides by zero there).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from clue_ds.tasks.kinds.tag.entities import Label, entities_of


class Counts(NamedTuple):
    """Numbers of entities."""

    right: int
    predicted: int
    true: int

    @property
    def f1(self) -> float:
        return 2 * self.right / max(1, self.predicted + self.true)

    @property
    def precision(self) -> float:
        return self.right / max(1, self.predicted)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.true)


def _counts(truth: Sequence[set[Hashable]], predicted: Sequence[set[Hashable]]) -> Counts:
    pairs = list(zip(truth, predicted, strict=True))
    right = sum(len(true & found) for true, found in pairs)
    return Counts(right, sum(len(found) for _, found in pairs), sum(len(true) for true, _ in pairs))


def text_sets(truth: Sequence[Label], predicted: Sequence[Label], kind: str) -> Counts:
    """Counts of one type as CLUENER's leaderboard counts."""
    return _counts(
        [set(one.get(kind, ())) for one in truth], [set(one.get(kind, ())) for one in predicted]
    )


def spans(truth: Sequence[Label], predicted: Sequence[Label]) -> Counts:
    """Counts over (type, start, end)."""
    return _counts(
        [set(entities_of(one)) for one in truth], [set(entities_of(one)) for one in predicted]
    )


def by_type(
    truth: Sequence[Label], predicted: Sequence[Label], types: Sequence[str]
) -> dict[str, Counts]:
    """The counts of text sets of every type that occurs in either."""
    counts = {kind: text_sets(truth, predicted, kind) for kind in types}
    return {kind: count for kind, count in counts.items() if count.predicted + count.true}


def scores(
    truth: Sequence[Label], predicted: Sequence[Label], types: Sequence[str]
) -> dict[str, float]:
    """Both F1, and precision and recall of the spans, as fractions."""
    of_types = by_type(truth, predicted, types)
    of_spans = spans(truth, predicted)
    return {
        "text_set_f1": sum(count.f1 for count in of_types.values()) / max(1, len(of_types)),
        "span_f1": of_spans.f1,
        "span_precision": of_spans.precision,
        "span_recall": of_spans.recall,
    }
