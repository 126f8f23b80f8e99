"""Entities of a text, and their form in files: CLUENER's.

    {"name": {"叶老桂": [[9, 11]]}, "company": {"浙商银行": [[0, 3]]}}
     type     text     first and last character, both counted, from 0

Inside the program an entity is (type, start, end) with `end` after the last character. Guarantees:
what `parse` returns lies in the text, has one of the task's types and is written as it stands in
the text; the order is by start, and then the longer one first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from clue_ds.errors import UserError

Label = dict[str, dict[str, list[list[int]]]]
FORM = '{"type": {"text of the entity": [[first, last]]}}, both counted from 0'
SHOWN = 12  # types in one message; more are only counted


class Entity(NamedTuple):
    """Characters `start` to `end` - 1 of a text."""

    type: str
    start: int
    end: int


def parse(value: Any, text: str, types: Sequence[str], where: str) -> list[Entity]:
    """The entities of a label in CLUENER's form; a UserError begins with `where`."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: the entities must be an object {FORM}, not {_shown(value)}")
    found: list[Entity] = []
    for kind, texts in value.items():
        check_type(kind, types, where)
        if not isinstance(texts, dict):
            raise UserError(f"{where}: {kind} must be an object {FORM}, not {_shown(texts)}")
        for entity, places in texts.items():
            if not isinstance(places, list) or not places:
                raise UserError(
                    f"{where}: {kind} {entity!r} has no places; give a list [[first, last], ...]"
                )
            found += [_entity(kind, entity, place, text, where) for place in places]
    return ordered(found)


def _entity(kind: str, entity: str, place: Any, text: str, where: str) -> Entity:
    is_pair = isinstance(place, list) and len(place) == 2
    if not is_pair or not all(isinstance(n, int) and not isinstance(n, bool) for n in place):
        raise UserError(
            f"{where}: {kind} {entity!r} is at {_shown(place)}; give [first, last], two whole "
            "numbers counted from 0"
        )
    first, last = place
    if not 0 <= first <= last:
        raise UserError(
            f"{where}: {kind} {entity!r} is at [{first}, {last}], which is no range of characters; "
            "give the first and the last character, counted from 0"
        )
    if last >= len(text):
        hint = " (the second number is the last character, not the one after it)"
        raise UserError(
            f"{where}: {kind} {entity!r} is at [{first}, {last}], beyond the text, whose last "
            f"character is {len(text) - 1}{hint if last == len(text) else ''}; correct the numbers"
        )
    here = text[first : last + 1]
    if here != entity:
        at = text.find(entity)
        found = f"{entity!r} is at [{at}, {at + len(entity) - 1}]" if entity and at >= 0 else ""
        raise UserError(
            f"{where}: {kind} {entity!r} is given at [{first}, {last}], where the text has "
            f"{here!r}; correct the numbers{f' ({found})' if found else ''}"
        )
    return Entity(kind, first, last + 1)


def check_type(kind: str, types: Sequence[str], where: str) -> None:
    """UserError unless `kind` is one of the task's types."""
    if kind not in types:
        more = f", and {len(types) - SHOWN} more" if len(types) > SHOWN else ""
        raise UserError(
            f"{where}: {kind!r} is not one of the task's types of entities: "
            f"{', '.join(types[:SHOWN])}{more}; correct the line, or add the type to the task"
        )


def ordered(entities: Iterable[Entity]) -> list[Entity]:
    """Sorted by start, the longer one first, each once."""
    return sorted(set(entities), key=lambda e: (e.start, -e.end, e.type))


def overlaps(entities: Sequence[Entity]) -> list[tuple[Entity, Entity]]:
    """Pairs of ordered entities that share characters, each with the one that reaches furthest."""
    found = []
    furthest: Entity | None = None
    for entity in entities:
        if furthest is not None and entity.start < furthest.end:
            found.append((furthest, entity))
        if furthest is None or entity.end > furthest.end:
            furthest = entity
    return found


def without_overlaps(entities: Iterable[Entity]) -> list[Entity]:
    """Entities that share no character: of those that overlap the longest stays, else the first."""
    kept: list[Entity] = []
    for entity in sorted(entities, key=lambda e: (e.start - e.end, e.start, e.type)):
        if not touches(entity, kept):
            kept.append(entity)
    return ordered(kept)


def touches(entity: Entity, others: Iterable[Entity]) -> bool:
    """Whether the entity shares a character with one of the others."""
    return any(entity.start < other.end and other.start < entity.end for other in others)


def label_of(entities: Iterable[Entity], text: str) -> Label:
    """Entities in CLUENER's form."""
    label: Label = {}
    for entity in entities:
        places = label.setdefault(entity.type, {})
        places.setdefault(text[entity.start : entity.end], []).append(
            [entity.start, entity.end - 1]
        )
    return label


def entities_of(label: Label) -> list[Entity]:
    """The entities of a label that was checked before."""
    return ordered(
        Entity(kind, first, last + 1)
        for kind, texts in label.items()
        for places in texts.values()
        for first, last in places
    )


def describe(entity: Entity, text: str) -> str:
    """For messages."""
    return f"{entity.type} {text[entity.start : entity.end]!r} [{entity.start}, {entity.end - 1}]"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
