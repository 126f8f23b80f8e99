"""Attention inside each of the sequences that lie end to end in one buffer, by several back ends.

    rows    a loop over the sequences, for a CPU: no padding, no mask, and scores that stay in cache
    triton  the kernel of clue_ds.kernels
    flash   torch's FlashAttention, for half precision on NVIDIA's and AMD's GPUs
    dense   the sequences as rows of a padded batch: everywhere, and slow

Guarantees: all of them compute the same, up to rounding and which probabilities they drop. None but
`rows`, which runs on the host, waits for the device. `triton`, `flash` and `dense` have static
shapes; spare sequences, which are empty, may follow the last one.

FlashAttention takes head sizes that are multiples of 8. Others are padded with zeros, which moves
more bytes than a third of a block does, and still less than a mask in fp32 would.

Rejected: torch's `varlen_attn` (no dropout).

T: tokens   R: queries   Z: sequences   S: the longest   N: heads   D: head size
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_ds import kernels
from clue_ds.kernels import reference
from clue_ds.model import ops
from clue_ds.presets import Attention

Backend = Literal["rows", "triton", "flash", "dense"]
# A core's second cache holds 1 MiB or more, and an operation on a thousand scores is all overhead.
CACHED_SCORES = 1 << 18
GROUPED_SCORES = 1 << 12  # of one head
FLASH_MULTIPLE = 8  # of head sizes that FlashAttention takes


class Group(NamedTuple):
    """Neighbouring sequences of one length and one number of queries each, as rows of a batch."""

    num_sequences: int
    first_token: int
    length: int
    first_query: int
    num_queries: int

    def tokens(self, x: Tensor) -> Tensor:
        """x [T, N, D] -> a view [Z, N, S, D] of this group."""
        return _rows_of(x, self.first_token, self.num_sequences, self.length)

    def queries(self, x: Tensor) -> Tensor:
        """x [R, N, D] -> a view [Z, N, Q, D] of this group."""
        return _rows_of(x, self.first_query, self.num_sequences, self.num_queries)

    def heads(self, num_heads: int) -> list[slice]:
        """The heads, in as many parts as keep the scores of one part in cache."""
        scores = self.num_sequences * self.length * self.num_queries
        size = max(1, min(num_heads, CACHED_SCORES // scores))
        size = -(-num_heads // -(-num_heads // size))  # parts of about equal size
        return [slice(i, i + size) for i in range(0, num_heads, size)]


def _rows_of(x: Tensor, first: int, num: int, length: int) -> Tensor:
    return x[first : first + num * length].unflatten(0, (num, length)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where sequences begin in a buffer of tokens, and in one of queries: int32 [Z + 1] each.

    The numbers are the longest sequence, and the most queries of one sequence.
    """

    cu_seqlens: Tensor
    cu_predictions: Tensor
    max_seqlen: int
    max_predictions: int
    attention: Attention

    @cached_property
    def groups(self) -> list[Group]:
        """For attention of all tokens to all others."""
        begins = self.cu_seqlens.tolist()
        return _groups(begins, begins)

    @cached_property
    def query_groups(self) -> list[Group]:
        """For attention of the queries to all tokens."""
        return _groups(self.cu_seqlens.tolist(), self.cu_predictions.tolist())


def _groups(tokens: list[int], queries: list[int]) -> list[Group]:
    groups: list[Group] = []
    for i in range(len(tokens) - 1):
        length, num = tokens[i + 1] - tokens[i], queries[i + 1] - queries[i]
        if length == 0 or num == 0:
            continue
        last = groups[-1] if groups else None
        if (
            last is not None
            and (last.length, last.num_queries) == (length, num)
            and (last.num_sequences + 1) * length * num <= GROUPED_SCORES
            and last.first_query + last.num_sequences * num == queries[i]
            and last.first_token + last.num_sequences * length == tokens[i]
        ):
            groups[-1] = last._replace(num_sequences=last.num_sequences + 1)
        else:
            groups.append(Group(1, tokens[i], length, queries[i], num))
    return groups


def choose(tokens: Tensor, attention: Attention) -> Backend:
    """The back end for keys and values like `tokens` [..., D]; all follows from its place and type.

    `attention` masked_softmax, the reference path, is always dense.
    """
    if attention == "masked_softmax":
        return "dense"
    if tokens.device.type == "cpu":
        return "rows"
    if ops.takes_attention(tokens):
        return "triton"
    has_flash = tokens.device.type in ("cuda", "meta")  # "cuda" is AMD's device, too
    return "flash" if has_flash and tokens.dtype in (torch.float16, torch.bfloat16) else "dense"


def packed_attention(
    tokens: Tensor,
    layout: Layout,
    p: float,
    training: bool,
    query: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v within each sequence.

    tokens [T, 3, N, D] are query, key and value of every token -> [T, N, D]. With `query` [R, N, D]
    they are keys and values, [T, 2, N, D] -> [R, N, D].
    """
    p = p if training else 0.0
    backend = backend or choose(tokens, layout.attention)
    if backend == "rows":
        return _rows(tokens, query, layout, p)
    if backend == "triton":
        if query is None:
            return kernels.attention(tokens, layout.cu_seqlens, layout.max_seqlen, p, training)
        lengths = (layout.max_predictions, layout.max_seqlen)
        offsets = (layout.cu_predictions, layout.cu_seqlens)
        return kernels.attention_to(query, tokens, *offsets, *lengths, p, training)
    q, k, v = tokens.unbind(1) if query is None else (query, *tokens.unbind(1))
    cu_queries, longest = layout.cu_predictions, layout.max_predictions
    if query is None:
        cu_queries, longest = layout.cu_seqlens, layout.max_seqlen
    ends = (cu_queries, layout.cu_seqlens, longest, layout.max_seqlen)
    if backend == "flash":
        size = q.shape[-1]
        if padding := -size % FLASH_MULTIPLE:
            q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
        return flash(q, k, v, *ends, p, size**-0.5)[0][..., :size]
    return _dense(q, k, v, *ends, p, layout.attention)


# ----------------------------------------------------------------------------------------- dense


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_queries: int,
    max_seqlen: int,
    p: float,
    attention: Attention,
) -> Tensor:
    places = torch.arange(max_seqlen, device=q.device)
    query_places = torch.arange(max_queries, device=q.device)
    keys = (cu_seqlens[:-1, None] + places).clamp(max=len(k) - 1)  # [Z, S]
    queries = (cu_queries[:-1, None] + query_places).clamp(max=len(q) - 1)  # [Z, Q]
    # One key is kept in a spare sequence too: softmax over none would be NaN, and so would its
    # gradient, although nobody uses either.
    keep = (places < cu_seqlens.diff()[:, None]) | (places == 0)
    query, key, value = (
        x[index].transpose(1, 2) for x, index in ((q, queries), (k, keys), (v, keys))
    )
    # [Z, N, Q, D]
    context = ops.attention(query, key, value, keep[:, None, None], p, True, attention)
    index = torch.arange(len(q), device=q.device, dtype=cu_queries.dtype)
    sequence = torch.searchsorted(cu_queries[1:].contiguous(), index, right=True)
    return context[sequence, :, index - cu_queries[sequence]]


# ------------------------------------------------------------------------------------------ rows


@torch.compiler.disable
def _rows(tokens: Tensor, query: Tensor | None, layout: Layout, p: float) -> Tensor:
    # Not compiled: the loop would be unrolled, and compiled anew, for every batch.
    groups = layout.groups if query is None else layout.query_groups
    with torch.autocast("cpu", enabled=False):  # which would multiply in bf16
        return _Rows.apply(tokens, query, groups, p)


class _Rows(torch.autograd.Function):
    """The loop, with one gradient for all tokens: autograd would fill a whole one per sequence.

    It computes in fp32: on small matrices that takes half as long as in bf16, on CPUs with AMX too.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, query: Tensor | None, groups: list[Group], p: float
    ) -> Tensor:
        q, k, v = _wide_parts(tokens, query)
        num_dropped, scale = reference.dropout_threshold(p)
        out = torch.empty(q.shape, dtype=q.dtype)
        saved: list[Tensor] = []
        for group, heads in _parts(groups, q.shape[1]):
            scaled = group.queries(q)[:, heads] * q.shape[-1] ** -0.5
            keys = group.tokens(k)[:, heads]
            scores = torch.matmul(scaled, keys.transpose(-1, -2))  # [Z, heads, Q, S]
            probabilities = scores.softmax(-1)
            saved.append(probabilities)
            if p > 0.0:
                saved.append(reference.keep_mask(probabilities.shape, num_dropped))
                probabilities = (probabilities * saved[-1]).mul_(scale)
            context = torch.matmul(probabilities, group.tokens(v)[:, heads])
            group.queries(out)[:, heads] = context
        ctx.save_for_backward(tokens, query, *saved)
        ctx.groups, ctx.p = groups, p
        return out.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, query, *saved = ctx.saved_tensors
        q, k, v = _wide_parts(tokens, query)
        grad_out = grad_out.to(q.dtype)
        # Sequences without queries are in no group.
        make = torch.empty_like if query is None else torch.zeros_like
        grad_tokens = make(tokens, dtype=q.dtype)
        grad_query = None if query is None else torch.empty_like(query, dtype=q.dtype)
        grads = grad_tokens.unbind(1)
        grad_q, grad_k, grad_v = grads if grad_query is None else (grad_query, *grads)
        _, scale = reference.dropout_threshold(ctx.p)
        root = q.shape[-1] ** -0.5
        step = 2 if ctx.p > 0.0 else 1
        for number, (group, heads) in enumerate(_parts(ctx.groups, q.shape[1])):
            probabilities, *kept = saved[step * number : step * (number + 1)]
            grad = group.queries(grad_out)[:, heads]
            grad_scores = torch.matmul(grad, group.tokens(v)[:, heads].transpose(-1, -2))
            dropped = probabilities
            if kept:
                dropped = (probabilities * kept[0]).mul_(scale)
                grad_scores.mul_(kept[0]).mul_(scale)
            group.tokens(grad_v)[:, heads] = torch.matmul(dropped.transpose(-1, -2), grad)
            grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, q.dtype)
            grad_queries = torch.matmul(grad_scores, group.tokens(k)[:, heads])
            group.queries(grad_q)[:, heads] = grad_queries.mul_(root)
            grad_keys = torch.matmul(grad_scores.transpose(-1, -2), group.queries(q)[:, heads])
            group.tokens(grad_k)[:, heads] = grad_keys.mul_(root)
        grad_tokens = grad_tokens.to(tokens.dtype)
        return grad_tokens, None if grad_query is None else grad_query.to(tokens.dtype), None, None


def _wide_parts(tokens: Tensor, query: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, at least in fp32."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    k, v = tokens[:, -2:].to(dtype).unbind(1)
    return (tokens[:, 0] if query is None else query).to(dtype), k, v


def _parts(groups: list[Group], num_heads: int) -> Iterator[tuple[Group, slice]]:
    return ((group, heads) for group in groups for heads in group.heads(num_heads))


# ----------------------------------------------------------------------------------------- flash


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_queries: int,
    max_seqlen: int,
    p: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [R, N, D], k and v [T, N, D] -> [R, N, D], and what the backward pass needs beside it."""
    ends = (cu_queries, cu_seqlens, max_queries, max_seqlen)
    found = torch.ops.aten._flash_attention_forward(q, k, v, *ends, p, False, False, scale=scale)
    out, logsumexp, rng_state, unused = found[:4]
    return out, logsumexp, rng_state, unused


flash = torch.library.custom_op("clue_ds::flash_packed", _flash, mutates_args=())
flash.register_fake(_flash)  # aten's operator knows its shapes on the meta device


@torch.library.custom_op("clue_ds::flash_packed_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_queries: int,
    max_seqlen: int,
    p: float,
    scale: float,
    rng_state: Tensor,
    unused: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    ends = (cu_queries, cu_seqlens, max_queries, max_seqlen)
    tensors = (grad, q, k, v, out, logsumexp)
    return torch.ops.aten._flash_attention_backward(
        *tensors, *ends, p, False, rng_state, unused, scale=scale
    )


@flash_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_flash(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_queries, cu_seqlens, *ctx.numbers = inputs
    out, logsumexp, rng_state, unused = output
    ctx.save_for_backward(q, k, v, out, logsumexp, cu_queries, cu_seqlens, rng_state, unused)
    ctx.mark_non_differentiable(logsumexp, rng_state, unused)


def _flash_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, cu_queries, cu_seqlens, rng_state, unused = ctx.saved_tensors
    numbers = (cu_queries, cu_seqlens, *ctx.numbers, rng_state, unused)
    return (*flash_backward(grad.contiguous(), *tensors, *numbers), *([None] * 6))


flash.register_autograd(_flash_gradients, setup_context=_save_for_flash)
