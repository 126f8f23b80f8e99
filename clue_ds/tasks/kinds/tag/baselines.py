"""What can be had without a model: nothing, and a list of the entities of train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from clue_ds.tasks.kinds.tag.entities import Entity, Label, label_of

MAJORITY = "always predicting the most frequent tag (O)"
LEXICON = "looking up the entities of train, the longest first"

Lexicon = dict[int, dict[str, str]]  # length, longest first -> text of an entity -> its type


def lexicon(labels: Sequence[Label]) -> Lexicon:
    """The texts of all entities, each with the type that it has most often."""
    counts: dict[str, Counter[str]] = {}
    for label in labels:
        for kind, texts in label.items():
            for text, places in texts.items():
                counts.setdefault(text, Counter())[kind] += len(places)
    known: Lexicon = {}
    for text in sorted(counts, key=len, reverse=True):
        known.setdefault(len(text), {})[text] = counts[text].most_common(1)[0][0]
    return known


def look_up(text: str, known: Lexicon) -> Label:
    """The entities that a reader of the text from left to right finds in the lexicon."""
    found = []
    start = 0
    while start < len(text):
        kind, end = _longest(text, start, known)
        if kind is not None:
            found.append(Entity(kind, start, end))
        start = end
    return label_of(found, text)


def _longest(text: str, start: int, known: Lexicon) -> tuple[str | None, int]:
    for length, kinds in known.items():
        kind = kinds.get(text[start : start + length])
        if kind is not None:
            return kind, start + length
    return None, start + 1
