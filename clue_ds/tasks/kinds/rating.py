"""What choice and cloze share: several sequences are rated, and a softmax compares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clue_ds.tasks.features import Features, Unit


class Rivals(NamedTuple):
    """The sequences of which one is right."""

    rows: tuple[Features, ...]

    @property
    def size(self) -> int:
        return max(len(row.input_ids) for row in self.rows)

    @property
    def truncated(self) -> bool:
        return any(row.truncated for row in self.rows)


def loss(outputs: Tensor, units: Sequence[Unit], targets: Sequence[int]) -> Tensor:
    """The mean cross entropy; `outputs` [rows of all units, 1] are the ratings."""
    counts = torch.tensor([len(unit.rows) for unit in units], device=outputs.device)
    places = torch.arange(int(counts.max()), device=outputs.device) < counts[:, None]
    logits = outputs.new_full(places.shape, float("-inf"), dtype=torch.float32)
    logits = logits.masked_scatter(places, outputs.float().flatten())
    return F.cross_entropy(logits, torch.tensor(targets, device=outputs.device))


def ratings(outputs: Tensor, units: Sequence[Unit]) -> list[np.ndarray]:
    """The ratings of each unit's sequences, float32 [rows]."""
    ends = np.cumsum([len(unit.rows) for unit in units])
    return np.split(outputs.float().flatten().cpu().numpy(), ends[:-1])


def probabilities(rated: np.ndarray) -> list[float]:
    """The softmax of a unit's ratings."""
    return torch.from_numpy(rated).softmax(-1).tolist()
