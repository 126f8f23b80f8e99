"""The public operations: each runs as a Triton kernel or as its twin in `reference`.

M: rows (any leading dimensions, packed tokens [T, H] too)   H: hidden size
B: sequences   N: heads   Q, K: query and key positions

Both compute in fp32 whatever the inputs' dtype, and give the first tensor's dtype. Activations may
be fp32, fp16 or bf16 with parameters of the same or another of these. Dropout masks come from one
draw of torch's default generator a call, or from `seed` (int, or int64 tensor [1] on the device):
with the same seed kernel and twin drop the same elements. Parameters are read in forward and kept
as they are for backward, so that ZeRO-3 may empty and refill them between the two.

Operations import this package's kernels only where Triton is installed (`available`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .backend import HAS_TRITON, is_host_bound, use_triton

if HAS_TRITON:
    from . import bias_dropout_add_layer_norm as fused_add_norm
    from . import bias_gelu as fused_gelu
    from . import embedding_layer_norm as fused_embedding
    from . import layer_norm as fused_norm
    from . import masked_softmax as fused_softmax


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x [..., H], weight and bias [H] or None -> [..., H]."""
    if use_triton(x, x.shape[-1]) and not is_host_bound(x, weight):
        return fused_norm.layer_norm(x, weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)


def bias_dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    ln_bias: Tensor,
    p: float,
    eps: float,
    training: bool,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    seed: Tensor | int | None = None,
    return_mask: bool = False,
) -> Any:
    """LayerNorm(residual + dropout(x + bias)): x and residual [..., H]; bias, weight, ln_bias [H].

    `bias` is None where the GEMM before it has added it, `residual` None where there is none.
    Returns y like x; with `prenorm` also the sum that was normalized, in the residual's dtype or,
    with `residual_in_fp32`, fp32; with `return_mask` also the bool mask of kept elements (the twin
    needs a seed for it). All: (y, sum, mask).
    """
    options = (p, eps, training, prenorm, residual_in_fp32, seed, return_mask)
    implementation = fused_add_norm if use_triton(x, x.shape[-1]) else reference
    return implementation.bias_dropout_add_layer_norm(x, bias, residual, weight, ln_bias, *options)


def masked_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float = 1,
    dropout_p: float = 0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """dropout(softmax(scale * scores + mask)) over the last dimension: [B, N, Q, K] -> the same.

    A bool `mask` broadcasts to scores and is True where a key is MASKED: Megatron's polarity
    (Hugging Face's and SDPA's True means keep). A float mask is added to the scaled scores and gets
    no gradient. `key_lengths` int [B] keeps the first n keys of each sequence. A row whose keys are
    all masked is zeros and has zero gradients; a NaN in a key that is not masked stays visible.
    """
    # Integers as defaults, which torch.compile takes for constants: of 1.0 it makes a symbol, and
    # compiles a second time when it finds that nothing can use one.
    options = (mask, key_lengths, scale, dropout_p, training, seed)
    implementation = fused_softmax if use_triton(scores, scores.shape[-1]) else reference
    return implementation.masked_softmax(scores, *options)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """GELU(x + bias): x [..., H], bias [H] or None.

    "none" is erf (Hugging Face's "gelu"), "tanh" what TensorFlow's BERT computes ("gelu_new").
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate {approximate!r} is neither 'none' nor 'tanh'")
    # Columns are split over programs, so no width is too large.
    implementation = fused_gelu if use_triton(x, min(x.shape[-1], 1)) else reference
    return implementation.bias_gelu(x, bias, approximate)


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    eps: float,
    training: bool,
    padding_idx: int | None = None,
    seed: Tensor | int | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[ids] + position[0..S) + token_type[types])): ids [B, S] -> [B, S, H].

    word [V, H], position [>= S, H], token_type [T, H], all of one dtype, which is the result's; no
    token types means type 0 everywhere. `padding_idx` is the word that gets no gradient. An id
    beyond its table is an IndexError in the twin on a CPU and a row of NaN in the kernel.
    """
    tables = (word, position, token_type)
    options = (weight, bias, p, eps, training, padding_idx, seed)
    implementation = fused_embedding if use_triton(word, word.shape[-1]) else reference
    return implementation.embedding_layer_norm(input_ids, token_type_ids, *tables, *options)
