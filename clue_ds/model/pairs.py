"""The network of `train.objective: pair`: BERT and a classifier of labelled sentence pairs.

Data sets with the same labels share a head; others have their own. One matrix holds all heads, one
row per label, and a pair is classified only among the labels of its own data set. The head is used
in training only: checkpoints keep it so that a run can resume, but exports contain only the BERT,
with its trained pooler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clue_ds.model import ops
from clue_ds.model.bert import BertForPreTraining
from clue_ds.model.blocks import Dense
from clue_ds.model.init import initialize_parameters
from clue_ds.presets import ModelConfig

HEAD = "pair_head."


class BertForPairs(BertForPreTraining):
    """`label_sets[i]` is the number of the set that label i belongs to, ascending from 0."""

    def __init__(
        self,
        config: ModelConfig,
        label_sets: list[int],
        attention: ops.Attention = "sdpa",
        padded_vocab_size: int | None = None,
    ) -> None:
        super().__init__(config, attention, padded_vocab_size)
        self.pair_head = Dense(config.hidden_size, len(label_sets))
        if not self.pair_head.bias.is_meta:
            initialize_parameters(self.pair_head, config, torch.initial_seed())
        self.register_buffer("label_sets", torch.tensor(label_sets), persistent=False)

    def pair_logits(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """pooled [B, H], labels [B] -> logits [B, L], -inf for labels of other sets."""
        others = self.label_sets != self.label_sets[labels][:, None]  # type: ignore[index]
        return self.pair_head(pooled).float().masked_fill(others, float("-inf"))
