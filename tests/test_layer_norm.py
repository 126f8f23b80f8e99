"""The layer_norm kernel compared with fp64, by the error rule of kernel_checks.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import LONG_DTYPES, ROWS, WIDTHS, compare, guard_bands, guarded, has_gradients
from torch import Tensor

from clue_ds import kernels
from clue_ds.kernels import reference

EPS = 1e-12
SHAPES = [(65, width) for width in WIDTHS] + [(rows, 312) for rows in ROWS] + [(129, 769)]

fused = partial(kernels.layer_norm, eps=EPS)
unfused = partial(reference.layer_norm, eps=EPS)


def make(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, weight, bias."""
    x = torch.randn(rows, width, device=device).to(dtype)
    return [x, *torch.randn(2, width, device=device)]


@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
def test_all_shapes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    for rows, width in SHAPES:
        inputs = partial(make, rows, width, dtype, kernel_device)
        checked = has_gradients(width, kernel_device)
        compare(fused, unfused, inputs, {}, f"{rows} x {width}", has_gradients=checked)


def test_parameters_may_be_absent_or_of_the_activations_dtype(kernel_device: torch.device) -> None:
    for absent in ((), (2,), (1, 2)):

        def low(absent: tuple[int, ...] = absent) -> list[Tensor | None]:
            inputs = make(33, 64, torch.bfloat16, kernel_device)
            return [None if i in absent else t.bfloat16() for i, t in enumerate(inputs)]

        compare(fused, unfused, low, {}, f"without {absent}")


@pytest.mark.parametrize("width", [57, 312, 768])
def test_a_mean_of_1e3_costs_no_more_digits_than_torchs(
    width: int, kernel_device: torch.device
) -> None:
    """Rounding the mean once made our error 1.9 times torch's."""

    def far() -> list[Tensor]:
        x, *parameters = make(33, width, torch.float32, kernel_device)
        return [x + 1e3, *parameters]

    compare(fused, unfused, far, {}, f"mean 1e3, width {width}")


def test_rows_of_one_large_number_are_zeros(kernel_device: torch.device) -> None:
    """Their variance must be 0 however the mean is rounded; a negative one would give NaN.

    A GPU fuses the product with 1 / H into a subtraction and leaves its rounding, which is
    multiplied by 1 / sqrt(eps) = 1e6: on an H200 these rows are not exactly 0.
    """
    x = torch.tensor([[1e6 + 0.25], [1e3 + 0.1], [3e7]], device=kernel_device).expand(3, 312)
    weight, bias = torch.ones(312, device=kernel_device), torch.zeros(312, device=kernel_device)
    y = fused(x, weight, bias)
    assert y.abs().max() <= (0.0 if kernel_device.type == "cpu" else 1.0)


def test_statistics_stay_fp32_beside_bf16_rows(kernel_device: torch.device) -> None:
    """Liger kept mean and rstd in bf16, which loses the variance's digits at a mean of 1000."""
    weight, bias = torch.ones(768, device=kernel_device), torch.zeros(768, device=kernel_device)

    def far() -> list[Tensor]:
        x = torch.randn(33, 768, device=kernel_device) + 1e3
        return [x.bfloat16(), weight, bias]

    compare(fused, unfused, far, {}, "mean 1e3 in bf16")


def test_rows_may_be_strided_and_have_any_leading_dimensions(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(2, 24, device=kernel_device)
    for x in (
        torch.randn(4, 6, 48, device=kernel_device)[..., :24],
        torch.randn(24, 5, device=kernel_device).T,
        torch.randn(2, 3, 4, 24, device=kernel_device).transpose(1, 2),
    ):
        expected = unfused(x, weight, bias)
        torch.testing.assert_close(fused(x, weight, bias), expected, rtol=1e-5, atol=1e-5)


def test_touches_nothing_outside_its_buffers(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for rows, width in ((1, 1), (3, 7), (5, 312), (129, 769)):
        plain = [torch.randn(s, device=kernel_device) for s in ((rows, width), (width,), (width,))]
        leaves = [guarded(t).requires_grad_() for t in plain]
        with guard_bands(monkeypatch):
            out = fused(*leaves)
            grads = torch.autograd.grad(out, leaves, guarded(torch.randn_like(out)))
        assert all(t.isfinite().all() for t in (out, *grads))


def test_a_nan_stays_in_its_row(kernel_device: torch.device) -> None:
    x = torch.randn(3, 312, device=kernel_device)
    x[1, 100] = float("nan")
    weight, bias = torch.ones(312, device=kernel_device), torch.zeros(312, device=kernel_device)
    out = fused(x, weight, bias)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


def test_parameter_gradients_repeat_bit_for_bit(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(515, 312, device=kernel_device, requires_grad=True)
    weight, bias = (torch.randn(312, device=kernel_device, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)
    first, second = (torch.autograd.grad(fused(x, weight, bias), (weight, bias), dy) for _ in "12")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
