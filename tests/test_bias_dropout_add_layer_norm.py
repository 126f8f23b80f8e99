"""The bias_dropout_add_layer_norm kernel compared with fp64; with a seed, its mask too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_checks import LONG_DTYPES, ROWS, WIDTHS, compare, guard_bands, guarded, has_gradients
from torch import Tensor

from clue_ds import kernels
from clue_ds.kernels import reference

EPS = 1e-12
SEED = 0x1234_5678_9ABC_DEF
SHAPES = [(65, width) for width in WIDTHS] + [(rows, 312) for rows in ROWS] + [(129, 769)]

fused = partial(kernels.bias_dropout_add_layer_norm, eps=EPS, training=True)
unfused = partial(reference.bias_dropout_add_layer_norm, eps=EPS, training=True)


def make(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, bias, residual, weight, ln_bias."""
    x, residual = torch.randn(2, rows, width, device=device).to(dtype)
    bias, weight, ln_bias = torch.randn(3, width, device=device)
    return [x, bias.to(dtype), residual, weight, ln_bias]


@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
def test_all_shapes(dtype: torch.dtype, kernel_device: torch.device) -> None:
    for i, (rows, width) in enumerate(SHAPES):
        p = (0.0, 0.1, 0.5)[i % 3]
        inputs = partial(make, rows, width, dtype, kernel_device)
        checked, what = has_gradients(width, kernel_device), f"{rows} x {width}, p={p}"
        options = {"p": p, "seed": SEED}
        compare(fused, unfused, inputs, options, what, has_gradients=checked)


def test_a_mean_of_1e3_costs_no_more_digits_than_torchs(kernel_device: torch.device) -> None:
    def far() -> list[Tensor]:
        inputs = make(33, 312, torch.float32, kernel_device)
        inputs[2] += 1e3
        return inputs

    compare(fused, unfused, far, {"p": 0.1, "seed": SEED}, "residual at 1e3")


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_mask_sum_and_gradients_are_those_of_the_reference(
    p: float, kernel_device: torch.device
) -> None:
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in make(37, 312, torch.float32, kernel_device)]
    options = {"p": p, "seed": SEED, "prenorm": True, "return_mask": True}
    y, total, mask = fused(*inputs, **options)
    expected_y, expected_total, expected_mask = unfused(*inputs, **options)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(total, expected_total)
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-5)
    grads = [torch.randn_like(y), torch.randn_like(y)]  # of both results, as in a pre-LN block
    ours = torch.autograd.grad((y, total), inputs, grads)
    theirs = torch.autograd.grad((expected_y, expected_total), inputs, grads)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_only_the_sum_is_used(kernel_device: torch.device) -> None:
    inputs = [t.requires_grad_() for t in make(5, 24, torch.float32, kernel_device)]
    _, total = fused(*inputs, p=0.0, prenorm=True)
    dx, dresidual = torch.autograd.grad(total.sum(), (inputs[0], inputs[2]))
    assert torch.equal(dx, torch.ones_like(dx)) and torch.equal(dresidual, torch.ones_like(dx))


def test_bias_and_residual_may_be_absent(kernel_device: torch.device) -> None:
    for absent in ((1,), (2,), (1, 2)):

        def some(absent: tuple[int, ...] = absent) -> list[Tensor | None]:
            inputs = make(33, 40, torch.bfloat16, kernel_device)
            return [None if i in absent else t for i, t in enumerate(inputs)]

        for p in (0.0, 0.3):
            compare(fused, unfused, some, {"p": p, "seed": SEED}, f"p={p}, without {absent}")


def test_dtypes_of_result_and_sum(kernel_device: torch.device) -> None:
    x, bias, residual, weight, ln_bias = make(4, 16, torch.bfloat16, kernel_device)
    for operation in (fused, unfused):
        for kept, in_fp32, expected in (
            (residual, False, torch.bfloat16),
            (residual, True, torch.float32),
            (residual.float(), False, torch.float32),
            (None, True, torch.float32),
        ):
            options = {"p": 0.1, "prenorm": True, "residual_in_fp32": in_fp32, "seed": SEED}
            y, total = operation(x, bias, kept, weight, ln_bias, **options)
            assert y.dtype == torch.bfloat16 and total.dtype == expected
    wide = residual.float().requires_grad_()
    (grad,) = torch.autograd.grad(fused(x, bias, wide, weight, ln_bias, p=0.0).sum(), wide)
    assert grad.dtype == torch.float32


def test_seed_comes_from_the_default_generator(kernel_device: torch.device) -> None:
    inputs = make(9, 312, torch.float32, kernel_device)
    torch.manual_seed(3)
    first, second = fused(*inputs, p=0.1), fused(*inputs, p=0.1)
    torch.manual_seed(3)
    assert torch.equal(fused(*inputs, p=0.1), first)
    assert not torch.equal(first, second)
    still = torch.get_rng_state()
    kernels.bias_dropout_add_layer_norm(*inputs, p=0.1, eps=EPS, training=False)
    assert torch.equal(still, torch.get_rng_state())  # evaluation draws nothing


def test_touches_nothing_outside_its_buffers(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    for rows, width in ((1, 1), (3, 7), (5, 312), (129, 769)):
        plain = make(rows, width, torch.float32, kernel_device)
        leaves = [guarded(t).requires_grad_() for t in plain]
        with guard_bands(monkeypatch):
            out = fused(*leaves, p=0.1, seed=SEED)
            grads = torch.autograd.grad(out, leaves, guarded(torch.randn_like(out)))
        assert all(t.isfinite().all() for t in (out, *grads))
