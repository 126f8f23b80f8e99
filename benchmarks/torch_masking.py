"""BERT's masking as torch operations on whole tensors, as the loader benchmark's peers do it.

This file imports only torch, because peers that run in another interpreter import it too.
"""

from __future__ import annotations

import torch


def mask_in_torch(ids: torch.Tensor, vocab_size: int, mask_id: int) -> tuple[torch.Tensor, ...]:
    """Masked ids and labels of a batch [B, S], whose first and last columns are never masked."""
    labels = ids.clone()
    chosen = torch.rand(ids.shape) < 0.15
    chosen[:, 0] = chosen[:, -1] = False
    labels[~chosen] = -100
    draw = torch.rand(ids.shape)
    ids[chosen & (draw < 0.8)] = mask_id
    replaced = chosen & (draw >= 0.9)
    ids[replaced] = torch.randint(vocab_size, ids.shape)[replaced]
    return ids, labels
