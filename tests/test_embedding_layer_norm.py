"""The embedding_layer_norm kernel compared with the reference in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import DTYPES, compare, guard_bands, guarded, has_gradients
from torch import Tensor

from clue_ds import kernels
from clue_ds.kernels import reference

NUM_WORDS = 23


def make(width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """word, position, token_type, weight, bias."""
    tables = [torch.randn(n, width, device=device).to(dtype) for n in (NUM_WORDS, 16, 2)]
    return [*tables, *torch.randn(2, width, device=device)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_widths(dtype: torch.dtype, kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    for i, width in enumerate((1, 7, 8, 64, 312, 768, 769, 1024)):
        shape = ((9, 14), (8, 16), (65, 1), (0, 4))[i % 4]
        ids = torch.randint(0, NUM_WORDS, shape, device=kernel_device)
        types = torch.randint(0, 2, shape, device=kernel_device) if i % 2 else None
        options = {"p": (0.0, 0.1)[i // 2 % 2], "eps": 1e-12, "training": True, "seed": 5}
        options["padding_idx"] = 3 if i % 3 else None
        fused = partial(kernels.embedding_layer_norm, ids, types)
        unfused = partial(reference.embedding_layer_norm, ids, types)
        tables = partial(make, width, dtype, kernel_device)
        checked = has_gradients(width, kernel_device)
        compare(fused, unfused, tables, options, f"{shape} x {width}", has_gradients=checked)


def test_padding_word_gets_no_gradient(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    tables = [t.requires_grad_() for t in make(24, torch.float32, kernel_device)]
    ids = torch.tensor([[3, 0, 3, 7]], device=kernel_device)
    out = kernels.embedding_layer_norm(ids, None, *tables, 0.0, 1e-12, True, padding_idx=0)
    (grad,) = torch.autograd.grad(out, tables[0], torch.randn_like(out))
    assert torch.count_nonzero(grad[0]) == 0 and torch.count_nonzero(grad[3]) > 0


def test_id_outside_its_table_is_a_row_of_nan(kernel_device: torch.device) -> None:
    tables = make(24, torch.float32, kernel_device)
    ids = torch.tensor([[0, NUM_WORDS, -1, 1]], device=kernel_device)
    out = kernels.embedding_layer_norm(ids, None, *tables, 0.0, 1e-12, False)
    assert out.isnan().all(-1).tolist() == [[False, True, True, False]]
    types = torch.tensor([[0, 1, 2, 1]], device=kernel_device)
    fine = ids.clamp(0, NUM_WORDS - 1)
    out = kernels.embedding_layer_norm(fine, types, *tables, 0.0, 1e-12, False)
    assert out.isnan().all(-1).tolist() == [[False, False, True, False]]


def test_touches_nothing_outside_its_buffers(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for width in (1, 7, 312, 769):
        tables = [guarded(t).requires_grad_() for t in make(width, torch.float32, kernel_device)]
        ids = guarded(torch.randint(0, NUM_WORDS, (3, 7), device=kernel_device))
        types = guarded(torch.randint(0, 2, (3, 7), device=kernel_device))
        with guard_bands(monkeypatch):
            out = kernels.embedding_layer_norm(ids, types, *tables, 0.1, 1e-12, True, seed=5)
            grads = torch.autograd.grad(out, tables, guarded(torch.randn_like(out)))
        assert all(t.isfinite().all() for t in (out, *grads))
