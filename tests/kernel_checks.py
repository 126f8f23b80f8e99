"""How kernels are compared with torch: shapes, the error rule, guard bands around buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from clue_ds.kernels.verify.rule import FACTOR, OUTLIER_ULPS

# 1, 2, 7: below the narrowest tile; 8: exactly that tile; 312, 1000: divisible by 8, not by 16;
# 769: no two rows are aligned alike; 1536: 25% of a tile is padding; 2048, 4096: several warps per
# row.
WIDTHS = (1, 2, 7, 8, 64, 312, 384, 512, 640, 768, 769, 1000, 1024, 1536, 2048, 4096)
# 0: no launch; 127 to 129: one row below, at and above whole tiles.
ROWS = (0, 1, 3, 127, 128, 129)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Where every shape takes the interpreter 10 seconds or more.
LONG_DTYPES = (torch.float32, pytest.param(torch.float16, marks=pytest.mark.heavy), torch.bfloat16)

# An RMS over three rows is a matter of chance too, since a row's statistics affect all of the row.
# Shapes with fewer rows or columns than this are drawn again until there were so many in total. A
# launch in the interpreter takes 0.1 s.
ENOUGH = 256 if torch.cuda.is_available() else 32
# Where the exact gradient cancels to 0 (LayerNorm of width 1), torch's error may be exactly 0.
FLOOR = 2.0**-26
# The variance of a row of a few numbers may be close to 0 by chance. Then rstd makes one rounding
# in that row outweigh all others, and RMS is a matter of chance as well (with 2 columns, 4 times
# torch's with 2 threads and less than torch's with 1). With fewer columns than this, only the
# maximum is checked, with a floor of fp32 noise.
NARROW, NARROW_FLOOR = 16, 2.0**-22
GUARD = 64  # elements; a multiple of 16 bytes, so that views stay as aligned as fresh tensors


class Errors:
    """Errors of one output over several draws: ours and torch's."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is the activations'; its rounding affects fp32 parameters' gradients too."""
        self.dtype = dtype
        self.squares = [0.0, 0.0]
        self.worst = [0.0, 0.0]
        self.num_elements, self.largest = 0, 0.0
        self.num_columns = NARROW

    def add(self, ours: Tensor, low: Tensor, exact: Tensor) -> None:
        """Add the errors of one draw: of `ours` and of torch's `low`, compared with fp64."""
        assert ours.shape == exact.shape and ours.dtype == low.dtype
        if not ours.numel():
            return
        exact = exact.double()
        for i, tensor in enumerate((ours, low)):
            error = tensor.double() - exact
            self.squares[i] += error.square().sum().item()
            self.worst[i] = max(self.worst[i], error.abs().max().item())
        self.num_elements += exact.numel()
        self.num_columns = exact.shape[-1]
        self.largest = max(self.largest, exact.abs().max().item())

    def check(self, what: str) -> None:
        """Raise AssertionError if the rule is broken."""
        ours, low = ((total / max(self.num_elements, 1)) ** 0.5 for total in self.squares)
        # In torch's order fp32 sums of 16-bit numbers are often exact, so its error can be 0.
        floor = FLOOR * (1.0 if self.dtype == torch.float32 else max(1.0, self.largest))
        bound = FACTOR * low + floor
        is_narrow = self.num_columns < NARROW
        assert is_narrow or ours <= bound, (
            f"{what}: RMS error {ours:.3g} > {bound:.3g} (torch's: {low:.3g})"
        )
        ulp = torch.finfo(self.dtype).eps * self.largest
        floor = NARROW_FLOOR if is_narrow else FLOOR
        bound = FACTOR * self.worst[1] + OUTLIER_ULPS[self.dtype] * ulp + floor
        assert self.worst[0] <= bound, (
            f"{what}: an element is off by {self.worst[0]:.3g} > {bound:.3g}"
        )


def has_gradients(width: int, device: torch.device) -> bool:
    """Whether LayerNorm's gradients on rows of this width say anything about its kernel.

    With one column they are differences of two equal numbers, multiplied by 1 / sqrt(eps) = 1e6. A
    GPU's fused multiply-add rounds only one of the two, so that half a unit in the last place of
    the other is left (seen on an H200). The interpreter rounds both.
    """
    return width > 1 or device.type == "cpu"


def compare(
    fused: Callable[..., Tensor],
    unfused: Callable[..., Tensor],
    make: Callable[[], Sequence[Tensor | None]],
    options: dict[str, Any],
    what: str,
    own: Callable[..., Tensor] | None = None,
    has_gradients: bool = True,
) -> None:
    """Hold the result and every gradient of `fused` to the error rule, on inputs drawn by `make`.

    `unfused` in fp64 is taken as exact. In the inputs' dtypes it is also torch's own operation,
    unless `own` is given. Without `has_gradients` only the result is compared.
    """
    errors: list[Errors] = []
    num_draws = draw = 0
    while draw <= num_draws:
        torch.manual_seed(draw)
        inputs = make()
        exact = _run(unfused, inputs, options, torch.float64)
        ours, low = (_run(function, inputs, options, None) for function in (fused, own or unfused))
        if not errors:
            errors = [Errors(ours[0].dtype) for _ in ours]
            samples = min(ours[0].shape[-1], ours[0].numel() // max(ours[0].shape[-1], 1))
            num_draws = (ENOUGH - 1) // samples if samples else 0
        for error, tensors in zip(errors, zip(ours, low, exact, strict=True), strict=True):
            error.add(*tensors)
        draw += 1
    for i, error in enumerate(errors[: None if has_gradients else 1]):
        error.check(f"{what}, {f'gradient {i}' if i else 'result'}")


def _run(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    options: dict[str, Any],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """[result, gradients of the inputs], computed in `dtype`, or in the inputs' own if None."""
    leaves = [
        None if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in inputs
    ]
    torch.manual_seed(7)
    out = function(*leaves, **options)
    # Every second element of a wider buffer: gradients need not be contiguous.
    grad = torch.randn((*out.shape[:-1], 2 * out.shape[-1]), dtype=torch.float32)[..., ::2]
    grad = grad.to(inputs[0].dtype).to(out)  # type: ignore[union-attr]
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def round_as_gpus_do(monkeypatch: Any) -> None:
    """Make Triton's interpreter round fp32 to bf16; by itself it truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return cut(data, source, target, mode)
        rounded = torch.from_numpy(data).bfloat16().view(torch.int16)
        return rounded.numpy().view("uint16")

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def guarded(x: Tensor) -> Tensor:
    """A copy of x with NaN before and after it, so that reading outside of it shows."""
    filler = True if x.dtype == torch.bool else float("nan") if x.is_floating_point() else -(2**30)
    buffer = torch.full((x.numel() + 2 * GUARD,), filler, dtype=x.dtype, device=x.device)
    inner = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    return inner.copy_(x.detach())


@contextmanager
def guard_bands(monkeypatch: Any) -> Iterator[None]:
    """Within: torch.empty and empty_like put NaN around tensors; fails if any is overwritten."""
    real, buffers = torch.empty, []

    def empty(*shape: Any, **options: Any) -> Tensor:
        plain = real(*shape, **options)
        if not plain.is_floating_point():
            return plain
        buffer = torch.full(
            (plain.numel() + 2 * GUARD,), float("nan"), dtype=plain.dtype, device=plain.device
        )
        buffers.append(buffer)
        return buffer[GUARD : GUARD + plain.numel()].view(plain.shape)

    def empty_like(x: Tensor, **options: Any) -> Tensor:
        return empty(x.shape, dtype=x.dtype, device=x.device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    assert buffers, "nothing was allocated"
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), "wrote outside"
