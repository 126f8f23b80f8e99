"""The fused operations of a BERT encoder in plain torch: what every kernel must compute.

M: rows, usually batch x sequence (any leading dimensions will do)   H: hidden size
V: vocabulary   B, S: sequences   N: attention heads   Q, K: query and key positions
T: tokens of all sequences, one after another   R: queries of all sequences   D: head size

Guarantees: statistics and softmax are computed in fp32 whatever the dtype of the inputs; the result
has the dtype of the first input; a softmax row whose keys are all masked is zeros with zero
gradients, not NaN; a NaN in the input stays visible. Everything is differentiable by autograd and
works on any device, so tests compare the kernels with these functions, and training on a CPU uses
them.

Rejected: torch's dropout on a CPU. Its mask takes one serial draw per element: 37 ms for the
attention of one tiny layer at 32 x 128 tokens, as long as that layer's GEMMs take. Four 16-bit
draws from each 64-bit number take 7 ms, and come from the same generator.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The kernels take these numbers from here: their masks are those of `philox_keep`, and in attention
# those of `philox_keep_scores`.
DROPOUT_LEVELS = 1 << 16  # a draw has 16 bits
DRAWS = 8  # of one Philox counter, which has 128 bits: two of each of its four words
PHILOX_ROUNDS = 7
QUAD = 4  # threads of a tensor core's result that hold one row of eight columns, two each


def dropout_threshold(p: float) -> tuple[int, float]:
    """(n, scale): an element is dropped if its 16-bit draw is below n; others are scaled.

    n / 65536 is within 8e-6 of `p` (0.1 -> 6554). The scale is that of the rounded rate, so that
    the expectation is exact.
    """
    num_dropped = round(p * DROPOUT_LEVELS)
    kept = DROPOUT_LEVELS - num_dropped
    return num_dropped, DROPOUT_LEVELS / kept if kept else 0.0


def keep_mask(shape: torch.Size, num_dropped: int) -> Tensor:
    """A CPU uint8 tensor, 1 with probability 1 - num_dropped / 65536, from torch's generator."""
    num_elements = shape.numel()
    words = torch.empty((num_elements + 3) // 4, dtype=torch.int64)
    # random_() without bounds leaves the sign bit clear, which would bias every fourth draw.
    draws = words.random_(-(2**63), None).view(torch.int16)[:num_elements]
    # uint8, because torch multiplies floats by bool at 40% of that speed (4.2 ms against 1.7 ms).
    return (draws >= num_dropped - DROPOUT_LEVELS // 2).view(torch.uint8).view(shape)


class _MaskedScale(torch.autograd.Function):
    """x * keep * scale, which saves one byte per element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None, None


def philox_keep(shape: torch.Size, num_dropped: int, seed: Tensor | int) -> Tensor:
    """bool like `shape`: the mask that the kernels draw from `seed`, bit for bit.

    A counter serves eight columns, one after another; see `_philox_draws`.
    """
    width = shape[-1]
    draws = _philox_draws(shape, -(-width // DRAWS), seed).flatten(1)[:, :width]
    return (draws >= num_dropped).view(shape)


def philox_keep_scores(shape: torch.Size, num_dropped: int, seed: Tensor | int) -> Tensor:
    """bool like `shape`, [..., keys]: the mask that attention's kernels draw from `seed`.

    Four counters serve 32 columns as tensor cores hold them: of each eight columns, a counter has
    two neighbouring ones. A thread then draws for its own scores, and none are exchanged.
    """
    width = shape[-1]
    num_blocks = -(-width // (QUAD * DRAWS))
    draws = _philox_draws(shape, QUAD * num_blocks, seed)
    # [rows, blocks, counters, words, halves], where a word is for one of the four eights
    draws = draws.unflatten(1, (num_blocks, QUAD)).transpose(2, 3).flatten(1)[:, :width]
    return (draws >= num_dropped).view(shape)


def _philox_draws(shape: torch.Size, num_counters: int, seed: Tensor | int) -> Tensor:
    """int64 [rows of `shape`, counters, 4 words, low and high half]: draws of 16 bits.

    This is Philox-4x32 (Salmon et al. 2011) with 7 rounds. The key is the seed's two halves, and
    the counter is (number of the counter in its row, low and high half of the row, 0). It is for
    parity only: it is slow, because int64 arithmetic stands in for uint32.
    """
    low = 0xFFFFFFFF
    seed = torch.as_tensor(seed).reshape(())
    rows = torch.arange(shape.numel() // max(shape[-1], 1), device=seed.device)[:, None]
    counters = torch.arange(num_counters, device=seed.device)[None, :]
    zero = torch.zeros_like(rows + counters)
    c0, c1, c2, c3 = zero + counters, zero + (rows & low), zero + (rows >> 32), zero
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(PHILOX_ROUNDS):
        # Products of two 32-bit numbers wrap modulo 2^64 in int64, which leaves both halves right.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (product2 >> 32 & low) ^ c1 ^ k0, (product0 >> 32 & low) ^ c3 ^ k1
        c1, c3 = product2 & low, product0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack((c0, c1, c2, c3), dim=-1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1)


def dropout(x: Tensor, p: float, training: bool, seed: Tensor | int | None = None) -> Tensor:
    """`F.dropout`, but on a CPU with our cheaper masks, and with a seed with the kernels' masks."""
    if not training or p == 0.0:
        return x
    if seed is not None:
        num_dropped, scale = dropout_threshold(p)
        return torch.where(philox_keep(x.shape, num_dropped, seed).to(x.device), x * scale, 0.0)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    num_dropped, scale = dropout_threshold(p)
    return _MaskedScale.apply(x, keep_mask(x.shape, num_dropped), scale)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension: x [..., H], weight and bias [H] or None -> [..., H]."""
    shape = x.shape[-1:]
    if weight is None or weight.dtype == x.dtype:
        y = torch.layer_norm(x, shape, weight, bias, eps)  # F.layer_norm's checks take 1 us
        return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast makes it fp32
    wide_bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), shape, weight.float(), wide_bias, eps).to(x.dtype)


def sum_dtype(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """The dtype that residual + dropout(x + bias) is kept in."""
    kept = x.dtype if residual is None else residual.dtype
    return torch.promote_types(kept, torch.float32) if residual_in_fp32 else kept


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
) -> Tensor | tuple[Tensor, ...]:
    """LayerNorm(residual + dropout(x + bias)): x and residual [..., H]; bias, weight, ln_bias [H].

    `bias` is None if the GEMM before it has already added it; `residual` is None if there is none.
    The result has x's dtype. `prenorm` adds the sum, in the residual's dtype or fp32;
    `return_mask`, which needs a seed if p > 0, adds the bool mask of kept elements. With both, the
    result is (y, sum, mask).
    """
    assert not return_mask or seed is not None or not training or p == 0.0, "a mask needs a seed"
    total = dropout(x if bias is None else x + bias, p, training, seed)
    if residual is not None:
        total = residual + total
    total = total.to(sum_dtype(x, residual, residual_in_fp32))
    y = layer_norm(total, weight, ln_bias, eps).to(x.dtype)
    results = [y, total] if prenorm else [y]
    if return_mask:
        num_dropped = dropout_threshold(p)[0] if training else 0
        keep = philox_keep(x.shape, num_dropped, 0 if seed is None else seed)
        results.append(keep.to(x.device))
    return tuple(results) if len(results) > 1 else y


def masked_softmax(
    scores: Tensor,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """dropout(softmax(scale * scores)) over the last dimension: scores [B, N, Q, K] -> same.

    A bool `mask` broadcasts to scores and is True where a key is MASKED, which is Megatron's
    polarity (in Hugging Face's and SDPA's masks, True means keep). A float mask is added to the
    scaled scores and gets no gradient. `key_lengths` [B] keeps the first n keys of each sequence.
    Either, both or none may be given. A row whose keys are all masked is zeros, and so is its
    gradient.
    """
    scaled = scores if scores.dtype == torch.float64 else scores.float()
    scaled = scaled * scale if scale != 1.0 else scaled
    if mask is not None and mask.dtype != torch.bool:
        scaled = scaled + mask.detach()
        mask = scaled == float("-inf")
    if key_lengths is not None:
        keys = torch.arange(scores.shape[-1], device=scores.device)
        beyond = (keys >= key_lengths[:, None])[:, None, None, :]  # [B, 1, 1, K]
        mask = beyond if mask is None else mask | beyond
    if mask is not None:
        scaled = scaled.masked_fill(mask, float("-inf"))
        # A row without keys would be 0 / 0: take the softmax of zeros instead, then zero it.
        empty = mask.all(dim=-1, keepdim=True)
        probabilities = scaled.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    else:
        probabilities = scaled.softmax(-1)
    return dropout(probabilities.to(scores.dtype), dropout_p, training, seed)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """GELU(x + bias): x [..., H], bias [H]; "none" is exact (erf), "tanh" is TensorFlow BERT's."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


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

    word [V, H], position [>= S, H], token_type [T, H]. Without `token_type_ids` every type is 0.
    `padding_idx` is the id of the word that gets no gradient.
    """
    summed = F.embedding(input_ids, word, padding_idx) + position[: input_ids.shape[-1]]
    if token_type_ids is None:
        summed = summed + token_type[0]
    else:
        summed = summed + F.embedding(token_type_ids, token_type)
    return dropout(layer_norm(summed, weight, bias, eps), p, training, seed)


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """Attention within each of the packed sequences: qkv [T, 3, N, D] -> [T, N, D].

    Sequence i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1]; cu_seqlens is [S + 1], from 0
    to T. No sequence is longer than `max_seqlen`. Scores are scaled by D ** -0.5.
    """
    lengths = (max_seqlen, max_seqlen)
    return attention_to(
        qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, *lengths, dropout_p, training, seed
    )


def attention_to(
    query: Tensor,
    kv: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_queries: int,
    max_seqlen: int,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | int | None = None,
) -> Tensor:
    """The same with queries of their own: query [R, N, D], kv [T, 2, N, D] -> [R, N, D].

    Query i sees the keys of its sequence, which cu_queries says as cu_seqlens does for keys. A
    query whose sequence has no keys gets zeros. With a seed, row (i, head) and column (position of
    the key in its sequence) decide whether a probability is dropped.
    """
    num_queries, num_heads, head_size = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    if not num_queries or not kv.shape[0]:
        return torch.zeros_like(query) + query[:0].sum() + kv[:0].sum()
    # Sequences as rows of a padded batch; what is taken beyond an end is masked or dropped again.
    rows, keys = (
        (start[:-1, None] + torch.arange(longest, device=query.device)).clamp(max=len(x) - 1)
        for start, longest, x in ((cu_queries, max_queries, query), (cu_seqlens, max_seqlen, kv))
    )
    q = query.to(wide)[rows].transpose(1, 2)  # [S, N, Q, D]
    k, v = kv.to(wide)[keys].permute(2, 0, 3, 1, 4)  # [S, N, K, D] each
    lengths = cu_seqlens.diff()
    scores = q @ k.transpose(-1, -2)
    probabilities = masked_softmax(scores, key_lengths=lengths, scale=head_size**-0.5)
    if seed is None:
        probabilities = dropout(probabilities, dropout_p, training)
    elif training and dropout_p > 0.0:
        num_dropped, scale = dropout_threshold(dropout_p)
        shape = torch.Size((num_queries, num_heads, max_seqlen))
        keep = philox_keep_scores(shape, num_dropped, seed).to(scores.device)[rows].transpose(1, 2)
        probabilities = torch.where(keep, probabilities * scale, 0.0)
    padded = (probabilities @ v).transpose(1, 2)  # [S, Q, N, D]
    index = torch.arange(num_queries, device=query.device)
    sequence = torch.searchsorted(cu_queries.contiguous(), index.to(cu_queries), right=True) - 1
    return padded[sequence, index - cu_queries[sequence]].to(query.dtype)
