"""What the benchmark measures: operations, cases, and the work that each of them must do."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

Op = Literal[
    "layer_norm",
    "bias_dropout_add_layer_norm",
    "masked_softmax",
    "bias_gelu",
    "embedding_layer_norm",
    "attention",
]
Mode = Literal["fwd", "bwd", "full"]
OPS: tuple[Op, ...] = get_args(Op)
SEQ_LENGTH = 128
HEAD_SIZES = {312: 26}  # RoBERTa-tiny's; that of all other widths is 64

# Elements that a fused operation reads and writes per element of its matrix: (forward, backward)
# without dropout, then the same with dropout.
TRAFFIC: dict[Op, tuple[tuple[int, int], tuple[int, int]]] = {
    "layer_norm": ((2, 3), (2, 3)),
    "bias_dropout_add_layer_norm": ((4, 3), (4, 4)),
    "masked_softmax": ((2, 3), (3, 3)),
    "bias_gelu": ((2, 3), (2, 3)),
    # The rows of its small tables stay in cache; the scatter into the tables is not counted.
    "embedding_layer_norm": ((2, 3), (2, 3)),
    # Queries, keys, values and result; in the backward pass their gradients as well.
    "attention": ((4, 8), (4, 8)),
}


class Case(NamedTuple):
    """An operation at one size, dtype and dropout probability."""

    op: Op
    rows: int
    hidden: int
    dtype: torch.dtype
    p: float
    seq_length: int = SEQ_LENGTH  # tokens of a sequence, for embeddings and attention

    @property
    def length(self) -> int:
        """`seq_length`, or all rows as one sequence if their number is not a multiple of it."""
        return self.rows if self.rows % self.seq_length else self.seq_length

    @property
    def head_size(self) -> int:
        """Of attention."""
        return HEAD_SIZES.get(self.hidden, min(self.hidden, 64))

    def num_bytes(self, mode: Mode) -> int:
        """The bytes that a fused operation must move."""
        forward, backward = TRAFFIC[self.op][self.p > 0]
        elements = {"fwd": forward, "bwd": backward, "full": forward + backward}[mode]
        return elements * self.rows * self.hidden * self.dtype.itemsize

    def num_flops(self, mode: Mode) -> int:
        """The floating-point operations of attention's products; 0 of other operations.

        Forward they are two products of rows x length scores, backward five.
        """
        if self.op != "attention":
            return 0
        products = {"fwd": 2, "bwd": 5, "full": 7}[mode]
        return products * 2 * self.rows * self.length * self.hidden


class Row(NamedTuple):
    """One figure: microseconds, and gigabytes (1e9) per second at the median."""

    op: str
    rows: int
    hidden: int
    dtype: str
    p: float
    mode: str
    clock: str
    provider: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float
    percent_of_copy: float
    seq_length: int
    tflop_per_s: float  # 0 where Case.num_flops counts none
