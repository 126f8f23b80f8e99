"""What config, sample stream and model must agree on: names of choices, and numbers.

The stream does not import config, and neither config nor model imports the stream. What they share
is therefore here, in a module that imports only the standard library.
"""

from __future__ import annotations

import math
from typing import Literal

# How a corpus is cut into rows (data.samples).
RowKind = Literal["windows", "sentences", "documents", "packed"]
# Objectives whose rows are pairs of texts from the corpus.
PairKind = Literal["nsp", "sop"]
# Every kind of samples that a SampleStream makes of a corpus.
Kind = Literal[RowKind, PairKind]
# The order of samples (data.order).
Order = Literal["auto", "shuffle", "lanes"]
# What a run is trained on (train.objective).
Objective = Literal["mlm", PairKind, "pair"]

# The label of an unused prediction slot, and of a pair without B: no loss is computed for it. It is
# the default `ignore_index` of PyTorch's cross_entropy.
IGNORED_LABEL = -100

MAX_LANES = 64


def num_lanes(global_batch_size: int) -> int:
    """Lanes into which an epoch is divided: streams with equal numbers have equal orders."""
    return math.gcd(MAX_LANES, global_batch_size)


def num_predictions(num_tokens: int, mask_prob: float) -> int:
    """Predictions for a sequence of this many tokens: 20 for 128 and 77 for 512 at 0.15."""
    return math.ceil(mask_prob * num_tokens)
