"""Turn texts into batches: [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

Texts of similar length share a batch, so that little of it is padding.

B: sequences   S: positions, the longest of the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from clue_ds.job import watchdog

if TYPE_CHECKING:
    from torch import Tensor

    from clue_ds.data import Tokenizer

Text = str | tuple[str, str]


class Features(NamedTuple):
    """One sequence as the model reads it."""

    input_ids: np.ndarray  # int64 [tokens], special tokens included
    num_first: int  # tokens of type 0
    truncated: bool

    @property
    def rows(self) -> tuple[Features, ...]:
        return (self,)

    @property
    def size(self) -> int:
        return len(self.input_ids)


class Unit(Protocol):
    """What a batch is made of and what has one target: a text, or a question with its choices."""

    @property
    def rows(self) -> Sequence[Features]:
        """The sequences that the model computes for it."""

    @property
    def size(self) -> int:
        """The tokens of its longest sequence; batches are sorted by it."""

    @property
    def truncated(self) -> bool:
        """Whether the model reads only a part of it."""


def encode(tokenizer: Tokenizer, text: Text, max_length: int) -> Features:
    """The text in at most `max_length` tokens; of a pair, the longer text loses tokens first."""
    ids = [tokenizer.encode(one) for one in ((text,) if isinstance(text, str) else text)]
    return assemble(tokenizer, ids, max_length)


def encode_all(tokenizer: Tokenizer, texts: Sequence[Text], max_length: int) -> list[Features]:
    """`encode` every text. This may take minutes, so each text is reported to the watchdog."""
    watch = watchdog.current()
    encoded: list[Features] = []
    for text in texts:
        encoded.append(encode(tokenizer, text, max_length))
        watch.mark()
    return encoded


def assemble(tokenizer: Tokenizer, ids: Sequence[np.ndarray], max_length: int) -> Features:
    """Features of the token ids of one text or of two, given without special tokens."""
    room = max_length - 1 - len(ids)
    kept = shares([len(one) for one in ids], room)
    sequence = [np.array([tokenizer.cls_id])]
    for one, length in zip(ids, kept, strict=True):
        sequence += [one[:length], np.array([tokenizer.sep_id])]
    truncated = sum(kept) < sum(map(len, ids))
    return Features(np.concatenate(sequence).astype(np.int64), kept[0] + 2, truncated)


def shares(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens each text keeps in `room`; the longest loses first, of equal ones the last.

    Of two texts that are both longer than half of an odd room, the second keeps one token more.
    """
    if len(lengths) == 2:
        first, second = lengths
        if first + second <= room:
            return [first, second]
        half = room // 2
        first = min(first, max(half, room - second))
        return [first, room - first]
    kept = list(lengths)
    while sum(kept) > room:
        longest = max(kept)
        below = max((length for length in kept if length < longest), default=0)
        tied = [i for i, length in enumerate(kept) if length == longest]
        excess = sum(kept) - room
        # Either all of the longest shrink to the next shorter length, or what is needed of it.
        cut, rest = divmod(min(excess, (longest - below) * len(tied)), len(tied))
        for number, i in enumerate(reversed(tied)):
            kept[i] -= cut + (number < rest)
    return kept


def collate(features: Sequence[Features], pad_id: int) -> dict[str, Tensor]:
    """The model's inputs: input_ids and token_type_ids [B, S], lengths [B], all int64."""
    import torch  # here, because the table of tasks imports this module, and `--help` the table

    lengths = torch.tensor([len(f.input_ids) for f in features])
    input_ids = torch.full((len(features), int(lengths.max())), pad_id)
    token_type_ids = torch.zeros_like(input_ids)
    for row, feature in enumerate(features):
        input_ids[row, : lengths[row]] = torch.from_numpy(feature.input_ids)
        token_type_ids[row, feature.num_first : lengths[row]] = 1
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "lengths": lengths}


def collate_units(units: Sequence[Unit], pad_id: int) -> dict[str, Tensor]:
    """`collate` of the sequences of all units, one unit after the other."""
    return collate([row for unit in units for row in unit.rows], pad_id)


def batches_by_length(
    units: Sequence[Unit], batch_size: int, max_tokens: int | None = None
) -> list[list[int]]:
    """Batches of indices: every unit once, sorted by length, longest first.

    A batch has at most `batch_size` sequences and `max_tokens` tokens with padding, but at least
    one unit.
    """
    order = sorted(range(len(units)), key=lambda i: (-units[i].size, i))
    batches: list[list[int]] = []
    room = 0
    for i in order:
        num_rows = len(units[i].rows)
        if num_rows > room:
            batches.append([])
            room = batch_size
            if max_tokens is not None:
                room = min(room, max_tokens // max(1, units[i].size))
        batches[-1].append(i)
        room -= num_rows
    return batches
