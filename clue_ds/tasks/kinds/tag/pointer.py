"""The optional head: a score for every type and every pair of a first and a last token.

Efficient GlobalPointer (Su and others, 2022, arXiv:2208.03054): one product of two rotated
projections scores which tokens belong together, and a bias per token and type scores which type
begins or ends there. Scores above 0 are entities, so that entities may overlap.

It stands where a CRF would: pytorch-crf had its last release in 2019, TorchCRF and pytorchcrf in
2020, and transformers-crf requires one old version of transformers.

B: sequences   S: positions   H: hidden size   C: types   D: size of the projections
"""

from __future__ import annotations

import torch
from torch import Tensor

from clue_ds.model import ops
from clue_ds.model.blocks import Dense
from clue_ds.model.init import initialize
from clue_ds.presets import ModelConfig
from clue_ds.tasks.heads import BertForTokens

PROJECTION_SIZE = 64
MASKED = -1e12  # the score of what can't be an entity; exp of it is 0


class BertForEntityPointer(BertForTokens):
    """Scores every span of tokens for every type. transformers has no class for this head."""

    def __init__(self, config: ModelConfig, num_types: int, seed: int = 42) -> None:
        super().__init__(config)
        self.entity_pointer = Dense(config.hidden_size, 2 * PROJECTION_SIZE)
        self.entity_types = Dense(2 * PROJECTION_SIZE, 2 * num_types)
        initialize(self, seed)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Scores [B, C, S, S] of (first, last) of int64 ids [B, S]; MASKED where none can be."""
        hidden = self.hidden(input_ids, token_type_ids, lengths)
        hidden = ops.dropout(hidden, self.config.hidden_dropout_prob, self.training)
        projected = self.entity_pointer(hidden)  # [B, S, 2 D]
        first, last = (rotated(half) for half in projected.float().chunk(2, dim=-1))
        together = first @ last.transpose(1, 2) / PROJECTION_SIZE**0.5  # [B, S, S]
        begins, ends = (self.entity_types(projected).float() / 2).transpose(1, 2).chunk(2, dim=1)
        scores = together[:, None] + begins[..., None] + ends[:, :, None]  # [B, C, S, S]
        return scores.masked_fill(~allowed(input_ids, lengths)[:, None], MASKED)


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding of x [B, S, D]: products then depend on the distance."""
    seq_length, size = x.shape[1:]
    rates = 10000.0 ** (-torch.arange(0, size, 2, device=x.device) / size)
    angles = torch.arange(seq_length, device=x.device)[:, None] * rates  # [S, D / 2]
    angles = angles.repeat_interleave(2, dim=-1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * angles.cos() + turned * angles.sin()


def allowed(input_ids: Tensor, lengths: Tensor | None) -> Tensor:
    """bool [B, S, S]: first and last are tokens between [CLS] and [SEP], in this order."""
    num_rows, seq_length = input_ids.shape
    positions = torch.arange(seq_length, device=input_ids.device)
    if lengths is None:
        lengths = torch.full((num_rows,), seq_length, device=input_ids.device)
    real = (positions > 0) & (positions < lengths[:, None] - 1)  # [B, S]
    ordered = positions[:, None] <= positions
    return real[:, :, None] & real[:, None] & ordered


def loss(scores: Tensor, is_entity: Tensor) -> Tensor:
    """The multi-label loss of scores [B, C, S, S] and bool targets of the same shape; a mean over
    B and C. It is smallest when entities score above 0 and everything else below."""
    flat, truth = scores.float().flatten(2), is_entity.flatten(2)  # [B, C, S * S]
    zero = torch.zeros_like(flat[..., :1])
    others = torch.cat([flat.masked_fill(truth, MASKED), zero], dim=-1).logsumexp(-1)
    entities = torch.cat([(-flat).masked_fill(~truth, MASKED), zero], dim=-1).logsumexp(-1)
    return (others + entities).mean()
