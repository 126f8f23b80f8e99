"""The seam between the model and `clue_ds.kernels`: which implementation runs is decided here.

The model calls nothing else for its heavy work, and which implementation ran never shows in the
weights. `choose_kernels` decides between Triton kernels and torch (by default: torch). With torch
the GEMM adds the bias, one pass over memory less; a fused kernel takes it for itself, and its
gradient comes out of the backward pass that it does anyway.

B: sequences   Q, K: query and key positions   N: heads   D: head size   H: hidden size
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clue_ds import kernels
from clue_ds.errors import UserError

Attention = Literal["sdpa", "masked_softmax"]

# Until the kernels have run on a GPU, a model takes them only where `model.kernels` says so.
kernels.set_backend("torch")

embedding_layer_norm = kernels.embedding_layer_norm
layer_norm = kernels.layer_norm
dropout = kernels.reference.dropout


def choose_kernels(name: str) -> None:
    """Which implementation runs in this process from now on: auto, triton or torch."""
    try:
        kernels.set_backend(name)
    except RuntimeError as error:
        raise UserError(f"model.kernels: {error}") from None


def dense_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """GELU(x W^T + bias): x [..., I], weight [O, I] -> [..., O]."""
    if kernels.use_triton(x, weight.shape[0]):
        return kernels.bias_gelu(F.linear(x, weight), bias, approximate)
    return kernels.bias_gelu(F.linear(x, weight, bias), None, approximate)


def dense_dropout_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    p: float,
    eps: float,
    training: bool,
) -> Tensor:
    """LayerNorm(residual + dropout(x W^T + bias)): x [..., I], weight [H, I] -> [..., H]."""
    gemm_bias, kernel_bias = (
        (None, bias) if kernels.use_triton(x, weight.shape[0]) else (bias, None)
    )
    return kernels.bias_dropout_add_layer_norm(
        F.linear(x, weight, gemm_bias), kernel_bias, residual, ln_weight, ln_bias, p, eps, training
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    p: float,
    training: bool,
    backend: Attention,
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v: query [B, N, Q, D], key, value [B, N, K, D] -> query's.

    `keep` is bool [B, 1, 1 or Q, K], True where a key may be attended to; None keeps all. A
    query must keep at least one key.
    """
    p = p if training else 0.0
    if backend == "sdpa" and (p == 0.0 or query.device.type != "cpu"):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=p)
    # On a CPU, SDPA with dropout materialises the scores too, with torch's slow dropout masks.
    # The scale goes into the query, which is a fifth of the scores' size or less.
    scaled = query * query.shape[-1] ** -0.5
    scores = torch.matmul(scaled, key.transpose(-1, -2))  # [B, N, Q, K]
    masked = None if keep is None else ~keep
    probabilities = kernels.masked_softmax(scores, masked, dropout_p=p, training=training)
    return torch.matmul(probabilities, value)
