"""The public operations: each runs as a Triton kernel or in plain torch (`reference`).

M: rows (any leading dimensions, packed tokens [T, H] too)   H: hidden size
B, S: sequences   N: heads   Q, K: query and key positions   D: head size
T: tokens of all sequences, one after another   R: queries of all sequences

Both compute in fp32 whatever the inputs' dtype, and return the first tensor's dtype. Activations
may be fp32, fp16 or bf16, with parameters of the same or another of these dtypes. A dropout mask
comes from one draw per call of torch's default generator, or from `seed` (an int, or an int64
tensor [1] on the device); with the same seed, kernel and reference drop the same elements.
Parameters are read in the forward pass and saved as they are for the backward pass, so that ZeRO-3
may free and gather them between the two.

The kernels are imported only if Triton is installed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .backend import HAS_TRITON, is_host_bound, use_triton

if HAS_TRITON:
    from . import attention as fused_attention
    from . import bias_dropout_add_layer_norm as fused_add_norm
    from . import bias_gelu as fused_gelu
    from . import embedding_layer_norm as fused_embedding
    from . import layer_norm as fused_norm
    from . import masked_softmax as fused_softmax


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x [..., H], weight and bias [H] or None -> [..., H]."""
    if use_triton(x, x.shape[-1], "layer_norm") and not is_host_bound(x, weight):
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

    `bias` is None if the GEMM before it has already added it; `residual` is None if there is none.

    Returns y, of x's shape and dtype. `prenorm` adds the sum that was normalized, in the residual's
    dtype or, with `residual_in_fp32`, in fp32. `return_mask` adds the bool mask of kept elements,
    for which the reference needs a seed. With both, the result is (y, sum, mask).
    """
    options = (p, eps, training, prenorm, residual_in_fp32, seed, return_mask)
    takes_kernel = use_triton(x, x.shape[-1], "bias_dropout_add_layer_norm")
    implementation = fused_add_norm if takes_kernel else reference
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

    A bool `mask` broadcasts to scores and is True where a key is MASKED, which is Megatron's
    polarity (in Hugging Face's and SDPA's masks, True means keep). A float mask is added to the
    scaled scores and gets no gradient. `key_lengths` int [B] keeps the first n keys of each
    sequence. A row whose keys are all masked is zeros and has zero gradients; a NaN score that is
    not masked makes its row NaN.
    """
    # The defaults are integers, because torch.compile takes those for constants. It makes a symbol
    # of 1.0, and compiles again when it finds that no operation can take one.
    options = (mask, key_lengths, scale, dropout_p, training, seed)
    takes_kernel = use_triton(scores, scores.shape[-1], "masked_softmax")
    implementation = fused_softmax if takes_kernel else reference
    return implementation.masked_softmax(scores, *options)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """GELU(x + bias): x [..., H], bias [H] or None.

    `approximate` is "none" for the exact GELU with erf (Hugging Face's "gelu"), or "tanh" for what
    TensorFlow's BERT computes (Hugging Face's "gelu_new").
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate {approximate!r} is neither 'none' nor 'tanh'")
    # The kernel splits columns over programs, so no width is too large for it.
    takes_kernel = use_triton(x, min(x.shape[-1], 1), "bias_gelu")
    implementation = fused_gelu if takes_kernel else reference
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

    word [V, H], position [>= S, H] and token_type [T, H] have one dtype, which is also the
    result's. Without `token_type_ids` every type is 0. `padding_idx` is the id of the word that
    gets no gradient. For an id outside its table, the reference raises IndexError on a CPU, and the
    kernel makes the row NaN.
    """
    tables = (word, position, token_type)
    options = (weight, bias, p, eps, training, padding_idx, seed)
    takes_kernel = use_triton(word, word.shape[-1], "embedding_layer_norm")
    implementation = fused_embedding if takes_kernel else reference
    return implementation.embedding_layer_norm(input_ids, token_type_ids, *tables, *options)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Attention within each of the packed sequences: qkv [T, 3, N, D] -> [T, N, D].

    Sequence i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1]. `cu_seqlens` is int32
    [S + 1], ascending from 0 to T, so that every token lies in a sequence: a token outside would
    keep whatever its memory held. Sequences may be empty. None may be longer than `max_seqlen`,
    which is a number on the host, so that nothing waits for the device.

    Scores are scaled by D ** -0.5. With a seed, the row (token, head) and the column (position of
    the key in its sequence) decide whether a probability is dropped. `qkv` may have any strides;
    its gradient is one contiguous tensor. The kernel takes even head sizes to 64, and the
    reference takes all others.
    """
    implementation = fused_attention if takes_attention(qkv) else reference
    return implementation.attention(qkv, cu_seqlens, max_seqlen, dropout_p, training, seed)


def attention_to(
    query: Tensor,
    kv: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_queries: int,
    max_seqlen: int,
    dropout_p: float = 0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """`attention` with queries of their own: query [R, N, D], kv [T, 2, N, D] -> [R, N, D].

    Query i sees the keys of its sequence. `cu_queries`, int32 [S + 1] from 0 to R, says where the
    queries of each sequence begin, and `max_queries` how many one has at most. The row of a
    dropout mask is (i, head). A query whose sequence has no keys gets zeros. Query, key and value
    have one dtype.
    """
    offsets = (cu_queries, cu_seqlens, max_queries, max_seqlen)
    implementation = fused_attention if takes_attention(query) else reference
    return implementation.attention_to(query, kv, *offsets, dropout_p, training, seed)


def takes_attention(x: Tensor) -> bool:
    """Whether attention on `x`, whose last dimension is the head size, runs the kernel."""
    head_size = x.shape[-1]
    return use_triton(x, head_size, "attention") and fused_attention.supports(head_size)
