"""Back ends of attention on packed sequences against the dense one, on a GPU.

Tolerance: bf16 keeps 8 bits of probabilities and of the result, in either back end.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clue_ds.model import ops
from clue_ds.model.packed_attention import Backend, Layout, packed_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS, QUERIES = [70, 1, 128, 0, 33, 0, 0], [9, 1, 20, 0, 4, 0, 0]
TOLERANCE = 2e-2


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()


@pytest.mark.parametrize(
    ("backend", "head_size"), [("flash", 64), ("flash", 26), ("triton", 64), ("triton", 26)]
)
@pytest.mark.parametrize("has_queries", [False, True], ids=["all", "queries"])
def test_results_and_gradients_equal_the_dense_back_ends(
    backend: Backend, head_size: int, has_queries: bool
) -> None:
    layout = Layout(offsets(LENGTHS), offsets(QUERIES), max(LENGTHS), max(QUERIES), "sdpa")
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    tokens = torch.randn(sum(LENGTHS), 2 if has_queries else 3, 3, head_size, **options)
    query = torch.randn(sum(QUERIES), 3, head_size, **options) if has_queries else None
    found = []
    ops.choose_kernels("triton" if backend == "triton" else "torch")
    for name in ("dense", backend):
        leaves = [t.clone().requires_grad_() for t in (tokens, query) if t is not None]
        out = packed_attention(leaves[0], layout, 0.0, True, *leaves[1:], backend=name)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        found.append([out, *grads])
    ops.choose_kernels("torch")
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)
