"""BERT's masking in whole-tensor torch steps, as the loader benchmark's peers do it.

A file of its own with nothing but torch, for peers that run in another interpreter.
"""

from __future__ import annotations

import torch


def mask_in_torch(ids: torch.Tensor, vocab_size: int, mask_id: int) -> tuple[torch.Tensor, ...]:
    """BERT's masking of a batch [B, S], but of its first and last column, in whole-tensor steps."""
    labels = ids.clone()
    chosen = torch.rand(ids.shape) < 0.15
    chosen[:, 0] = chosen[:, -1] = False
    labels[~chosen] = -100
    draw = torch.rand(ids.shape)
    ids[chosen & (draw < 0.8)] = mask_id
    replaced = chosen & (draw >= 0.9)
    ids[replaced] = torch.randint(vocab_size, ids.shape)[replaced]
    return ids, labels
