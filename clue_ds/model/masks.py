"""Which keys a query may attend to in rows that have padding or hold several sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def key_mask(
    lengths: Tensor | None, attention_mask: Tensor | None, seq_length: int
) -> Tensor | None:
    """bool [B, 1, 1, S], True for keys that count; None when all do (attention is then cheaper).

    On a GPU it is None only when neither argument is given, because finding out whether all keys
    count would synchronize with the GPU.
    """
    assert lengths is None or attention_mask is None, "give lengths or attention_mask, not both"
    if lengths is not None:
        keep = torch.arange(seq_length, device=lengths.device) < lengths[:, None]
    elif attention_mask is not None:
        keep = attention_mask.bool()
    else:
        return None
    if keep.device.type == "cpu" and bool(keep.all()):
        return None
    return keep[:, None, None, :]


def without_full_lengths(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch in host memory, without its `lengths` [B] if every row is full."""
    lengths, ids = batch.get("lengths"), batch["input_ids"]
    if lengths is None or ids.dim() == 1 or bool((lengths < ids.shape[1]).any()):
        return batch
    return {name: tensor for name, tensor in batch.items() if name != "lengths"}


def split_rows(cu_seqlens: Tensor, seq_length: int) -> tuple[Tensor, Tensor]:
    """position_ids [B, S] and attention mask of packed rows, which hold several sequences.

    The mask is bool [B, 1, S, S], True where query and key are in the same sequence. Padding counts
    as one more sequence, because softmax needs at least one key; its results are not used.
    """
    places = torch.arange(seq_length, device=cu_seqlens.device).expand(len(cu_seqlens), -1)
    # Sequence i of a row covers positions cu_seqlens[i] to cu_seqlens[i + 1] - 1, so the number of
    # ends that are not after a position is the number of its sequence.
    number = torch.searchsorted(cu_seqlens[:, 1:].contiguous(), places.contiguous(), right=True)
    # [B, 1, S, 1] == [B, 1, 1, S] -> [B, 1, S, S]
    same = number[:, None, :, None] == number[:, None, None, :]
    # Positions are counted from the start of their sequence.
    return places - cu_seqlens.gather(1, number), same
