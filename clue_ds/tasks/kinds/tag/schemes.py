"""Tags for tokens: BIO, BIOS or BIOES, from entities and back.

    浙 商 银 行 的 叶        BIO    B-company I-company I-company I-company O B-name
                             BIOES  B-company I-company I-company E-company O S-name

O is tag 0, and the tags of a type follow each other, so that a scheme and its types determine the
ids. Decoding takes any sequence of tags: an entity goes on as long as the type stays and no new one
begins. For BIO that is what transformers' token-classification pipeline does (`simple`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from clue_ds.tasks.kinds.tag.entities import Entity

Scheme = Literal["bio", "bios", "bioes"]
PREFIXES: dict[str, str] = {"bio": "BI", "bios": "BIS", "bioes": "BIES"}
OUTSIDE = "O"
IGNORED = -100  # the target of positions that are not trained


class Span(NamedTuple):
    """Tokens `first` to `last`, both included, that are an entity."""

    type: str
    first: int
    last: int


def tags(types: Sequence[str], scheme: Scheme = "bio") -> tuple[str, ...]:
    """The names of the tags in the order of their ids."""
    return (OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in PREFIXES[scheme]))


def split(name: str) -> tuple[str, str]:
    """(prefix, type) of a tag. A model from elsewhere may have types without prefixes: like the
    pipeline of transformers, read them as I-."""
    if name == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = name.partition("-")
    return (prefix, kind) if dash and kind and prefix in ("B", "I", "E", "S") else ("I", name)


def types_of(names: Sequence[str]) -> tuple[str, ...]:
    """The types of a list of tags, in its order."""
    return tuple(dict.fromkeys(split(name)[1] for name in names if name != OUTSIDE))


def covered(offsets: np.ndarray, entity: Entity) -> Span | None:
    """The tokens (offsets [tokens, 2]) that hold a character of an entity.

    None: there is no such token, because normalisation drops all of its characters.
    """
    first = int(np.searchsorted(offsets[:, 1], entity.start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], entity.end, side="left")) - 1
    return Span(entity.type, first, last) if first <= last else None


def entity_of(span: Span, offsets: np.ndarray) -> Entity:
    """The characters from the first token's first to the last token's last."""
    return Entity(span.type, int(offsets[span.first, 0]), int(offsets[span.last, 1]))


def encode(num_tokens: int, spans: Sequence[Span], names: Sequence[str]) -> np.ndarray:
    """Tag ids, int64 [tokens], of spans that share no token."""
    ids = {name: i for i, name in enumerate(names)}
    result = np.zeros(num_tokens, dtype=np.int64)
    for span in spans:
        inside = ids[f"I-{span.type}"]
        result[span.first : span.last + 1] = inside
        result[span.last] = ids.get(f"E-{span.type}", inside)
        result[span.first] = ids[f"B-{span.type}"]
        if span.first == span.last:
            result[span.first] = ids.get(f"S-{span.type}", ids[f"B-{span.type}"])
    return result


def decode(tag_ids: Sequence[int], names: Sequence[str]) -> list[Span]:
    """The entities of any sequence of tag ids."""
    spans: list[Span] = []
    parts = [split(name) for name in names]
    is_open = False  # whether the last span may go on
    for token, tag in enumerate(tag_ids):
        prefix, kind = parts[tag]
        if prefix == OUTSIDE:
            is_open = False
            continue
        if is_open and prefix in "IE" and spans[-1].type == kind:
            spans[-1] = spans[-1]._replace(last=token)
        else:
            spans.append(Span(kind, token, token))
        is_open = prefix in "BI"
    return spans
