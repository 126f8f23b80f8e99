"""Examples as the network reads them, and its outputs as answers, in training and prediction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clue_ds.data import Tokenizer
from clue_ds.errors import UserError
from clue_ds.job import watchdog
from clue_ds.tasks.features import Unit
from clue_ds.tasks.kinds import Answer, Example, Kind


class Encoded(NamedTuple):
    """Examples and their units; those of example i are units[bounds[i] : bounds[i + 1]]."""

    examples: Sequence[Example]
    units: Sequence[Unit]
    targets: Sequence[Any]  # of each unit; none without labels
    bounds: Sequence[int]
    notes: Mapping[str, int] = {}  # what of the answers can't be trained, and how often

    def truncated(self) -> list[bool]:
        """Whether the model reads only a part of each example."""
        return [any(u.truncated for u in self.units[a:b]) for a, b in self.ranges()]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The first unit of each example, and the one after its last."""
        return zip(self.bounds, self.bounds[1:], strict=False)


def encode(
    kind: Kind,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    max_length: int,
    labelled: bool = True,
    where: str = "",
) -> Encoded:
    """Encode all examples. This may take minutes, so each is reported to the watchdog.

    A UserError names the example by its id, after `where`.
    """
    watch = watchdog.current()
    units: list[Unit] = []
    targets: list[Any] = []
    bounds = [0]
    notes: Counter[str] = Counter()
    for example in examples:
        try:
            own = kind.encode(tokenizer, example.text, max_length)
        except UserError as error:
            place = f"{where}: " if where else ""
            raise UserError(f"{place}the example with id {example.id!r}: {error}") from None
        units += own
        bounds.append(len(units))
        if labelled:
            targets += kind.targets(example.text, example.label, own)
            notes.update(kind.notes(example.text, example.label, own))
        watch.mark()
    return Encoded(examples, units, targets, bounds, notes)


def grouped(encoded: Encoded, of_units: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """What belongs to the units of each example."""
    for begin, end in encoded.ranges():
        yield of_units[begin:end]


def first(encoded: Encoded) -> Encoded:
    """The first example alone."""
    end = encoded.bounds[1]
    return Encoded(encoded.examples[:1], encoded.units[:end], encoded.targets[:end], [0, end])


def answers(kind: Kind, encoded: Encoded, raws: Sequence[np.ndarray]) -> list[Answer]:
    """The answer to every example, from what `Kind.raw` gave for every unit."""
    return [
        kind.answer(example.text, units, own)
        for example, units, own in zip(
            encoded.examples, grouped(encoded, encoded.units), grouped(encoded, raws), strict=True
        )
    ]
