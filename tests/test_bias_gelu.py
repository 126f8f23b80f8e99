"""The bias_gelu kernel compared with fp64, erf and tanh."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import DTYPES, ROWS, WIDTHS, compare, guard_bands, guarded
from torch import Tensor

from clue_ds import kernels
from clue_ds.kernels import reference

SHAPES = [(65, width) for width in WIDTHS] + [(rows, 312) for rows in ROWS] + [(129, 1248)]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_shapes(dtype: torch.dtype, approximate: str, kernel_device: torch.device) -> None:
    for i, (rows, width) in enumerate(SHAPES):

        def make(i: int = i, rows: int = rows, width: int = width) -> list[Tensor | None]:
            x = 2 * torch.randn(rows, width, device=kernel_device).to(dtype)
            return [x, torch.randn(width, device=kernel_device).to(dtype) if i % 3 else None]

        compare(
            kernels.bias_gelu, reference.bias_gelu, make, {"approximate": approximate},
            f"{rows} x {width}, {approximate}",
        )  # fmt: skip


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 4.0])
def test_the_polynomial_keeps_the_rule_at_every_scale(
    scale: float, kernel_device: torch.device
) -> None:
    compare(
        kernels.bias_gelu, reference.bias_gelu,
        lambda: [scale * torch.randn(64, 1024, device=kernel_device), None], {}, f"scale {scale}",
    )  # fmt: skip


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_large_inputs_stay_finite(approximate: str, kernel_device: torch.device) -> None:
    x = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=kernel_device)
    x.requires_grad_()
    out = kernels.bias_gelu(x, None, approximate)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.tolist() == [[0.0, 0.0, 0.0, 0.0, 20.0, 100.0, 1e4]]
    assert grad.tolist() == [[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]]


def test_unknown_approximation_is_refused() -> None:
    with pytest.raises(ValueError, match="'sigmoid' is neither"):
        kernels.bias_gelu(torch.zeros(1, 1), None, "sigmoid")


def test_touches_nothing_outside_its_buffers(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, width in ((1, 1), (3, 7), (5, 312), (129, 769)):
        x = guarded(torch.randn(rows, width, device=kernel_device)).requires_grad_()
        bias = guarded(torch.randn(width, device=kernel_device)).requires_grad_()
        with guard_bands(monkeypatch):
            out = kernels.bias_gelu(x, bias)
            grads = torch.autograd.grad(out, (x, bias), guarded(torch.randn_like(out)))
        assert all(t.isfinite().all() for t in (out, *grads))
