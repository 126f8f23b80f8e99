"""Turn texts into batches: [CLS] a [SEP], or [CLS] a [SEP] b [SEP].

Texts of similar length share a batch, so that little of it is padding.

B: sequences   S: positions, the longest of the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clue_ds.data import Tokenizer
from clue_ds.job import watchdog

Text = str | tuple[str, str]


class Features(NamedTuple):
    """One text as the model reads it."""

    input_ids: np.ndarray  # int64 [tokens], special tokens included
    num_first: int  # tokens of type 0
    truncated: bool


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
    """How many tokens each of one or two texts keeps in `room`; the longer one loses first."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    first, second = lengths
    if first + second <= room:
        return [first, second]
    half = room // 2
    first = min(first, max(half, room - second))
    return [first, room - first]


def collate(features: Sequence[Features], pad_id: int) -> dict[str, Tensor]:
    """The model's inputs: input_ids and token_type_ids [B, S], lengths [B], all int64."""
    lengths = torch.tensor([len(f.input_ids) for f in features])
    input_ids = torch.full((len(features), int(lengths.max())), pad_id)
    token_type_ids = torch.zeros_like(input_ids)
    for row, feature in enumerate(features):
        input_ids[row, : lengths[row]] = torch.from_numpy(feature.input_ids)
        token_type_ids[row, feature.num_first : lengths[row]] = 1
    return {"input_ids": input_ids, "token_type_ids": token_type_ids, "lengths": lengths}


def batches_by_length(features: Sequence[Features], batch_size: int) -> list[list[int]]:
    """Batches of indices: every text once, sorted by length, longest first."""
    order = sorted(range(len(features)), key=lambda i: (-len(features[i].input_ids), i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
