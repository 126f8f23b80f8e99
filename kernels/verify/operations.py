"""What is compared: every operation, at the sizes of a run.

An operation is an entry of CASES: a function that returns a call on an implementation (`functional`
or `reference`) and the tensors whose gradients are compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .rule import FLOOR

# A tensor that is compared has at most this many elements (128 MiB in fp64). More rows would take
# time and memory, and run the same machine code.
MOST_ELEMENTS = 1 << 24
SEED, EPS = 0x1234_5678_9ABC, 1e-12


@dataclass(frozen=True)
class Shapes:
    """The sizes of a run: of its micro-batches and of its network."""

    num_sequences: int
    seq_length: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    approximate: str = "none"  # of GELU
    p: float = 0.1  # of dropout

    def sequences(self, elements_each: int) -> int:
        """Sequences of a comparison in which each takes this many elements of a tensor."""
        return max(1, min(self.num_sequences, MOST_ELEMENTS // elements_each))


class Case(NamedTuple):
    """`run(implementation, *inputs)` is the operation's result.

    `eager(*inputs)` is torch's own in the inputs' dtype, where the reference is more precise than
    that. `floor`: the share of the values' RMS below which an error is noise.
    """

    run: Callable[..., Tensor]
    inputs: list[Tensor]
    eager: Callable[..., Tensor] | None = None
    floor: float = FLOOR


class Draw:
    """Tensors of N(0, 1) in the dtype and on the device of a run."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device).to(self.dtype)


def _layer_norm(shapes: Shapes, draw: Draw) -> Case:
    hidden, length = shapes.hidden_size, shapes.seq_length
    rows = shapes.sequences(length * hidden) * length

    def run(implementation: Any, *tensors: Tensor) -> Tensor:
        return implementation.layer_norm(*tensors, EPS)

    return Case(run, [draw(rows, hidden), draw(hidden), draw(hidden)])


def _bias_dropout_add_layer_norm(shapes: Shapes, draw: Draw) -> Case:
    hidden, length = shapes.hidden_size, shapes.seq_length
    rows = shapes.sequences(length * hidden) * length

    def run(implementation: Any, *tensors: Tensor) -> Tensor:
        options = (shapes.p, EPS, True)
        return implementation.bias_dropout_add_layer_norm(*tensors, *options, seed=SEED)

    vectors = [draw(hidden) for _ in range(3)]
    x, residual = draw(rows, hidden), draw(rows, hidden)
    return Case(run, [x, vectors[0], residual, *vectors[1:]])


def _masked_softmax(shapes: Shapes, draw: Draw) -> Case:
    length, heads = shapes.seq_length, shapes.num_heads
    number = shapes.sequences(heads * length * length)
    # Sequences of all lengths, the last one full.
    lengths = torch.linspace(1, length, number, device=draw.device).ceil().long()

    def run(implementation: Any, scores: Tensor) -> Tensor:
        return implementation.masked_softmax(scores, None, lengths, 1, shapes.p, True, SEED)

    def eager(scores: Tensor) -> Tensor:
        return eager_masked_softmax(scores, lengths, 1.0, shapes.p, SEED)

    return Case(run, [draw(number, heads, length, length)], eager)


def eager_masked_softmax(
    scores: Tensor, key_lengths: Tensor, scale: float, dropout_p: float, seed: int
) -> Tensor:
    """masked_softmax in torch, in the scores' dtype, whose backward reads probabilities of it.

    So does our kernel, but the reference keeps probabilities in fp32. A scale that is a power of
    two rounds nothing.
    """
    beyond = torch.arange(scores.shape[-1], device=scores.device) >= key_lengths[:, None]
    masked = (scores * scale).masked_fill(beyond[:, None, None], float("-inf"))
    return reference.dropout(masked.softmax(-1), dropout_p, True, seed)


def _bias_gelu(shapes: Shapes, draw: Draw) -> Case:
    wide, length = shapes.intermediate_size, shapes.seq_length
    rows = shapes.sequences(length * wide) * length

    def run(implementation: Any, *tensors: Tensor) -> Tensor:
        return implementation.bias_gelu(*tensors, shapes.approximate)

    return Case(run, [draw(rows, wide), draw(wide)])


def _embedding_layer_norm(shapes: Shapes, draw: Draw) -> Case:
    hidden, length, words = shapes.hidden_size, shapes.seq_length, shapes.vocab_size
    size = (shapes.sequences(length * hidden), length)
    ids = torch.randint(words, size, device=draw.device)

    def run(implementation: Any, *tensors: Tensor) -> Tensor:
        options = (shapes.p, EPS, True)
        return implementation.embedding_layer_norm(ids, None, *tensors, *options, seed=SEED)

    tables = [draw(number, hidden) for number in (words, length, 2)]
    return Case(run, [*tables, draw(hidden), draw(hidden)])


def _attention(shapes: Shapes, draw: Draw) -> Case:
    length, heads, p = shapes.seq_length, shapes.num_heads, shapes.p
    number = shapes.sequences(heads * length * length)
    lengths = torch.linspace(1, length, number, device=draw.device).ceil()
    starts = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    shape = (int(starts[-1]), heads, length)
    num_dropped, _ = reference.dropout_threshold(p)
    keep = reference.philox_keep_scores(torch.Size(shape), num_dropped, SEED)

    def run(implementation: Any, qkv: Tensor) -> Tensor:
        return implementation.attention(qkv, starts, length, p, True, SEED)

    def eager(qkv: Tensor) -> Tensor:
        return _eager_attention(qkv, starts, length, p, keep.to(qkv.device))

    qkv = draw(shape[0], 3, heads, shapes.hidden_size // heads)
    # A GPU's exp2 is off by two units in the last place where torch's exp is not.
    return Case(run, [qkv], eager, floor=2.0**-18)


def _eager_attention(qkv: Tensor, starts: Tensor, length: int, p: float, keep: Tensor) -> Tensor:
    """The chain of products and softmax on padded sequences; keep is bool [T, N, length]."""
    places = torch.arange(length, device=qkv.device)
    rows = (starts[:-1, None] + places).clamp(max=len(qkv) - 1)
    inside = places < starts.diff()[:, None]
    q, k, v = qkv[rows].permute(2, 0, 3, 1, 4)  # [sequences, N, length, D] each
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~inside[:, None, None], float("-inf")).softmax(-1)
    kept = keep[rows].transpose(1, 2)
    weights = torch.where(kept, weights * reference.dropout_threshold(p)[1], 0.0)
    return (weights @ v).transpose(1, 2)[inside]


CASES: dict[str, Callable[[Shapes, Draw], Case]] = {
    "layer_norm": _layer_norm,
    "bias_dropout_add_layer_norm": _bias_dropout_add_layer_norm,
    "masked_softmax": _masked_softmax,
    "bias_gelu": _bias_gelu,
    "embedding_layer_norm": _embedding_layer_norm,
    "attention": _attention,
}
