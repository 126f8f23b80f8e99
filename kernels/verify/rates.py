"""How fast each kernel is at the sizes of a run, as percent of a copy of the same bytes."""

from __future__ import annotations

import torch

from .. import bench
from .operations import Shapes


def rates(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> dict[str, bench.Row]:
    """Forward and backward of every operation that bench.py measures; our kernels alone."""
    found: dict[str, bench.Row] = {}
    length = shapes.seq_length
    for op in bench.OPS:
        width, rows_each = shapes.hidden_size, length
        if op == "bias_gelu":
            width = shapes.intermediate_size
        elif op == "masked_softmax":
            width, rows_each = length, shapes.num_heads * length
        rows = shapes.sequences(width * rows_each) * rows_each
        case = bench.Case(op, rows, width, dtype, shapes.p)
        found[op] = bench.measure_ours(case, "full", device)
    return found
